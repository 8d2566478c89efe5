"""A headless Chromium, driven over ChromeDriver's WebDriver protocol (w3.org/TR/webdriver2) with plain HTTP."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
MISSING = (
    ""
    if CHROMIUM and CHROMEDRIVER
    else "there is no Chromium with its chromedriver here (apt: chromium chromium-driver)"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


class Browser:
    """One session. Scripts are bodies of functions; a failed command raises RuntimeError."""

    def __init__(self, port: int, folder: Path) -> None:
        self._port = port
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={folder}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(f"{value['error']}: {value['message']}")
        return value

    def command(self, path: str, **body: Any) -> Any:
        return self._ask("POST", f"{self._session}/{path}", body)

    def go(self, address: str) -> None:
        self.command("url", url=address)

    @property
    def address(self) -> str:
        return str(self._ask("GET", f"{self._session}/url"))

    def run(self, script: str, *args: Any) -> Any:
        return self.command("execute/sync", script=script, args=list(args))

    def text(self, selector: str) -> str:
        """What a person reads there."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def until(self, script: str, *args: Any, within_s: float = 30.0) -> Any:
        """The first value of an expression that is true."""
        end = time.monotonic() + within_s
        while not (found := self.run(f"return {script}", *args)):
            if time.monotonic() > end:
                raise AssertionError(f"{script} never came: {self.text('body')[:2000]}")
            time.sleep(0.02)
        return found

    def keys(self, *keys: str) -> None:
        """Presses and releases keys, one after the other, where the focus is."""
        pressed = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.command("actions", actions=[{"type": "key", "id": "keyboard", "actions": pressed}])

    @property
    def handle(self) -> str:
        """Of the tab that is seen."""
        return str(self._ask("GET", f"{self._session}/window"))

    def new_tab(self) -> str:
        return str(self.command("window/new", type="tab")["handle"])

    def switch(self, tab: str) -> None:
        self.command("window", handle=tab)

    def close_tab(self) -> None:
        self._ask("DELETE", f"{self._session}/window")

    def window(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)

    def dark(self, dark: bool) -> None:
        value = "dark" if dark else "light"
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def devtools(self, command: str, **params: Any) -> Any:
        return self.command("goog/cdp/execute", cmd=command, params=params)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", f"{self._session}/screenshot")))

    def complaints(self) -> list[str]:
        """Errors and warnings of the page and of its security policy, since the last time."""
        entries = self.command("se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def close(self) -> None:
        self._ask("DELETE", self._session)


@contextmanager
def browser() -> Iterator[Browser]:
    """Runs while entered. It leaves files where temporary ones are, and names sockets there: that path is short."""
    assert CHROMEDRIVER is not None
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        variables = os.environ | {"TMPDIR": folder}
        command = [CHROMEDRIVER, "--port=0"]
        with subprocess.Popen(command, stdout=pipe, stderr=nowhere, text=True, env=variables) as driver:
            try:
                assert driver.stdout is not None
                line = next(line for line in driver.stdout if "started successfully on port" in line)
                opened = Browser(int(line.rstrip().rstrip(".").rpartition(" ")[2]), Path(folder) / "profile")
                try:
                    yield opened
                finally:
                    opened.close()
            finally:
                driver.terminate()
                driver.wait(timeout=20)
