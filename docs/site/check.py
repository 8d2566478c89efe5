"""Check of the built site: `python docs/site/check.py build/docs`. A page loads nothing from an outside address.

Links to outside addresses are looked at for their form alone: nothing here asks the network.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

OUTSIDE = re.compile(r"(?:https?:)?//", re.I)
IN_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^)\"';]+)", re.I)


class Addresses(HTMLParser):
    """What one page loads, and where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster", "action") or (name == "href" and tag != "a"):
                self.loaded.append(value or "")
            elif name == "href":
                self.linked.append(value or "")
            elif name == "style":
                self.loaded += IN_STYLE.findall(value or "")


def faults(site: Path) -> list[str]:
    found = []
    for page in sorted(site.rglob("*.html")):
        addresses = Addresses()
        addresses.feed(page.read_text())
        found += [f"{page}: loads {address}" for address in addresses.loaded if OUTSIDE.match(address)]
        for address in addresses.linked:
            parts = urlsplit(address)
            if parts.scheme not in ("", "http", "https") or (parts.scheme and not parts.hostname) or " " in address:
                found.append(f"{page}: links to {address!r}, which is no address")
    for style in sorted(site.rglob("*.css")):
        found += [f"{style}: loads {address}" for address in IN_STYLE.findall(style.read_text())]
    return found


if __name__ == "__main__":
    site = Path(sys.argv[1])
    pages = len(list(site.rglob("*.html")))
    if found := faults(site):
        sys.exit("\n".join(found))
    print(f"{pages} pages in {site}: nothing of them comes from another address")
