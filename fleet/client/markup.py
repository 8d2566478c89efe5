"""HTML and SVG from values: every text and attribute is escaped, so that no value becomes markup; pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from fleet.text import shown_lines


@dataclass(frozen=True)
class Html:
    """Markup, which is put in as it is."""

    text: str


Inside = Html | str | None  # None: nothing
VOID = frozenset({"meta", "br"})


def tag(name: str, /, *inside: Inside, **attributes: str | float) -> Html:
    """An element. In names of attributes `_` stands for `-`, and a last one is dropped: `class_`."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{said}>" if name in VOID else f"<{name}{said}>{together(inside).text}</{name}>")


def together(parts: Iterable[Inside]) -> Html:
    """The parts behind each other. Control characters of texts are shown as in Python, but for line breaks."""
    return Html(
        "".join(
            part.text if isinstance(part, Html) else escape(shown_lines(part)) for part in parts if part is not None
        )
    )


def rows(head: Iterable[str], body: Iterable[Iterable[Inside]]) -> Html:
    """A table."""
    titles = tag("tr", *(tag("th", title, scope="col") for title in head))
    cells = (tag("tr", *(tag("td", cell) for cell in row)) for row in body)
    return tag("div", tag("table", tag("thead", titles), tag("tbody", *cells)), class_="wide")


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
