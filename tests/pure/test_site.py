"""The check of the built documentation site finds what a page would load from elsewhere."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

faults = runpy.run_path(str(Path(__file__).parents[2] / "docs/site/check.py"))["faults"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<script src="https://elsewhere.example/x.js"></script>'),
        ("a.html", '<link rel="stylesheet" href="//elsewhere.example/x.css">'),
        ("a.html", "<p style=\"background: url('http://elsewhere.example/x.png')\">"),
        ("a.css", '@import "https://elsewhere.example/font.css";'),
        ("a.html", '<a href="https:///no-host">'),
        ("a.html", '<a href="ftp://elsewhere.example/x">'),
    ],
)
def test_what_comes_from_elsewhere_is_found(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert len(faults(tmp_path)) == 1


def test_what_lies_beside_a_page_and_links_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<img src="b.png"><a href="https://elsewhere.example/x#y">x</a><a href="c.html">')
    (tmp_path / "a.css").write_text("p { background: url(data:image/png;base64,AAAA) }")
    assert faults(tmp_path) == []
