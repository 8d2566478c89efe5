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
const turns = [];
globalThis.document = { addEventListener: (_, turn) => turns.push(turn), createElement: () => ({}), querySelector: () => ({}) };
const pass = (seconds) => { for (let n = 0; n < seconds; n++) (now += 1000), looks.forEach((look) => look()); };
const sources = [];
globalThis.EventSource = class {
  static CONNECTING = 0;
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
HIDDEN = """
const { Feed } = await import("./feed.js");
const feed = new Feed(() => {});
const turn = (hidden) => ((document.hidden = hidden), turns.forEach((turn) => turn()));
const told = [], tell = () => told.push([feed.state, sources.length, sources.filter((source) => source.readyState !== 2).length]);
sources[0].heard.beat({});
turn(true);
pass(100);
tell(); // no connection, and none is lost
turn(false);
pass(5);
tell(); // one that has its time to answer
sources.at(-1).heard.beat({});
tell();
turn(true);
turn(false);
pass(13);
tell(); // no answer at all
turn(true);
pass(100);
tell(); // it is lost still, and nobody tries
turn(false);
sources.at(-1).heard.beat({});
tell();
console.log(JSON.stringify(told));
"""
LOGS = r"""
const { Logs } = await import("./logs.js");
const empty = { lines: [], rest: new Map(), decoders: new Map(), begun: [], whole: {} };
const logs = Object.assign(Object.create(Logs.prototype), empty);
const told = [], tell = () => told.push([...logs.lines, ...logs.beginnings()].map((line) => [line.text, [...line.ranks]]));
const print = (rank, text) => logs.take(rank, btoa(text));
logs.of({ attempt: 1 });
print(0, "one\ngo on? "), print(1, "one\ngo on? "), print(2, "10 %\r");
tell();
for (let turn = 0; turn < 2000; turn++) print(2, `${turn} %\r`); // longer than a line may be
tell();
logs.of({ attempt: 2 });
print(0, "two\n"), print(1, "two"), print(2, "two\r\n");
tell();
print(3, "y".repeat(4096)), print(3, "y".repeat(904) + "\n"); // in two parts, as it may come
told.push(logs.lines.at(-1).text.slice(3999));
console.log(JSON.stringify(told));
"""
USE = """
const { Use } = await import("./use.js");
const use = Object.assign(Object.create(Use.prototype), { counted: new Map(), answers: new Map() });
const made = (count) => [{ operation: "a", path: "p", count, byte_count: 10 * count, seconds: count / 100 }];
const of = (n, at_s, count) => ({ worker_id: `w${n}`, at_s: at_s + n, collectives: made(count) });
const rated = (used) => use.rated(use.latest(used))[0];
const at = (at_s, count) => rated([of(1, at_s, count), of(2, at_s, count)]);
use.on = new Set(["w1", "w2"]);
const told = [at(10, 100), at(12, 104), at(12, 104), at(14, 110), at(16, 3), at(18, 5), rated([of(1, 20, 7)]), at(22, 9)];
use.on = new Set(["w1"]);
told.push(rated([of(1, 24, 11)]));
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
def test_a_tab_that_nobody_sees_has_no_connection(tmp_path: Path) -> None:
    """Each time: the state, the connections so far, and those that are open."""
    assert run(tmp_path, HIDDEN) == [
        ["hidden", 1, 0], ["loading", 2, 1], ["live", 2, 1], ["lost", 4, 1], ["lost", 4, 0], ["live", 5, 1]
    ]  # fmt: skip


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_a_line_without_an_end_is_shown_and_is_none_of_the_next_attempt(tmp_path: Path) -> None:
    begun = [["one", [0, 1]], ["go on? ", [0, 1]]]
    assert run(tmp_path, LOGS) == [
        [*begun, ["10 %", [2]]],
        [*begun, ["1999 %", [2]]],
        [*begun, ["1999 %", [2]], ["two", [0, 2]], ["two", [1]]],
        "y … (shown: 4000 of 5000 characters)",
    ]


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_rates_of_collectives_are_by_the_workers_clocks(tmp_path: Path) -> None:
    """Of the first answer and a new attempt nothing is known; a worker that did not answer has the rate of its last answer."""
    assert run(tmp_path, USE) == [
        [200, False, 0], [208, True, 4], [208, True, 4], [220, True, 6], [6, False, 0], [10, True, 2],
        [12, True, 2], [18, True, 2], [11, True, 1]
    ]  # fmt: skip
