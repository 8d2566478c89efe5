"""Scripts of the page where no browser is needed: node runs them, with a connection and a clock that the test moves."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from fleet.page.pages import STATIC

NODE = shutil.which("node")

WORLD = """
let now = 1e12;
Date.now = () => now;
globalThis.matchMedia = () => ({ addEventListener() {} });
const looks = [];
globalThis.setInterval = (look) => looks.push(look);
globalThis.document = { addEventListener() {}, createElement: () => ({}), querySelector: () => ({}) };
const pass = (seconds) => { for (let n = 0; n < seconds; n++) (now += 1000), looks.forEach((look) => look()); };
const sources = [];
globalThis.EventSource = class {
  static CLOSED = 2;
  constructor() { this.readyState = 0; this.heard = {}; sources.push(this); }
  addEventListener(name, heard) { this.heard[name] = heard; }
  close() { this.readyState = 2; }
};
"""
FEED = """
const { Feed } = await import("./feed.js");
const feed = new Feed(() => {});
sources[0].heard.beat({});
pass(13); // a connection that breaks without a word: a new one
const first = sources.length;
pass(11); // which has its time
const waiting = sources.length;
pass(2); // and no more
const second = sources.length;
pass(22); // the next try has twice as long
const patient = sources.length;
sources.at(-1).readyState = 2; // refused
pass(1);
console.log(JSON.stringify([first, waiting, second, patient, sources.length]));
"""
USE = """
const { Use } = await import("./use.js");
const use = Object.assign(Object.create(Use.prototype), { counted: new Map() });
const made = (count) => [{ operation: "a", path: "p", count, byte_count: 10 * count, seconds: count / 100 }];
const of = (n, at_s, count) => ({ worker_id: `w${n}`, at_s: at_s + n, collectives: made(count) });
const at = (at_s, count) => use.rated([of(1, at_s, count), of(2, at_s, count)])[0];
const told = [at(10, 100), at(12, 104), at(12, 104), at(14, 110), at(16, 3), at(18, 5)];
console.log(JSON.stringify(told.map((one) => [one.count, one.known, one.now.count])));
"""


def run(folder: Path, script: str) -> object:
    for path in STATIC.glob("*.js"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "main.js").write_text(WORLD + script)
    assert NODE is not None
    done = subprocess.run([NODE, "main.js"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_a_connection_has_its_time_before_another_one_is_tried(tmp_path: Path) -> None:
    assert run(tmp_path, FEED) == [2, 2, 3, 3, 4]


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_rates_of_collectives_are_by_the_workers_clocks(tmp_path: Path) -> None:
    """Of the first answer, the same one again, and a new attempt nothing is known."""
    assert run(tmp_path, USE) == [
        [200, False, 0], [208, True, 4], [208, False, 0], [220, True, 6], [6, False, 0], [10, True, 2]
    ]  # fmt: skip
