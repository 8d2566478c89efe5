"""Pictures of the page for the documentation, of a real cluster: python -m tests.page.pictures docs/pictures

Needs Chromium with its driver, and torch.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from fleet.bus.address import free_port
from tests.chaos.commands import fleet
from tests.chaos.place import Place
from tests.page.browser import Browser, browser

TRAIN = """
import sys, time
import torch, fleet
from fleet.torch import DataParallel

comm = fleet.init()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
model = DataParallel(model, comm)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)


def load_batch(step):
    time.sleep(0.12 if comm.rank == 3 and "--slow" in sys.argv else 0.05)
    if step == 7 and "--broken" in sys.argv and comm.rank == 2:
        raise ValueError("shard-0007.npz is cut short: 512 of 4096 rows")
    return torch.randn(64, 256), torch.randint(0, 10, (64,))


for step in range(100_000 if "--long" in sys.argv else 40):
    x, y = load_batch(step)
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}", flush=True)
        if comm.rank == 0:
            print(f"loss {loss.item():.3f}", flush=True)
"""


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        here = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["TMPDIR"] = str(here)
        place = Place(stack, here, FLEET_METRICS_PORT=str(free_port("127.0.0.1")))
        for number in range(1, 5):
            place.start_worker(f"node-{number}", slots=4, FLEET_HOST=f"127.0.0.{10 + number}")
            place.wait_for_worker(f"node-{number}")
        (here / "code").mkdir()
        (here / "code" / "train.py").write_text(TRAIN)

        def run(*words: str) -> str:
            done = fleet(*words, ORCHESTRATOR_ADDR=place.address, FLEET_SECRET_FILE=str(here / "secret"))
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        script = str(here / "code" / "train.py")
        run("wait", run("submit", "--workers", "4", "--name", "warm-up", script))
        broken = run("submit", "--workers", "4", "--name", "broken shard", script, "--broken")
        time.sleep(12)
        slow = run("submit", "--workers", "8", "--name", "digits", script, "--long", "--slow")
        run("submit", "--workers", "16", "--name", "all of it", script, "--long")
        seen = stack.enter_context(browser())
        seen.window(1280, 1100)
        seen.go(run("dashboard"))
        seen.until("document.querySelector('#link').dataset.state === 'live'")
        _open(seen, slow)
        time.sleep(40)
        wide, narrow = (1280, 1100), (400, 1500)
        for name, dark, size in (("page", False, wide), ("page-dark", True, wide), ("page-narrow", False, narrow)):
            seen.window(*size)
            seen.dark(dark)
            seen.run("scrollTo(0, 0)")
            time.sleep(3)
            _keep(seen, folder / f"{name}.png")
        seen.dark(False)
        seen.window(1280, 800)
        _open(seen, broken)
        time.sleep(3)
        seen.run("scrollTo(0, 0)")
        time.sleep(1)
        _keep(seen, folder / "page-failed.png")


def _open(seen: Browser, job: str) -> None:
    seen.run("location.hash = `#job/${arguments[0]}`", job)
    seen.until(f"document.querySelector('#job h2')?.innerText.includes('{job}')")


def _keep(seen: Browser, path: Path) -> None:
    seen.picture(path)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
