"""fleet.Cluster without a notebook: what calls return, print and survive, on this machine and on a cluster."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from folded import lines_by_rank

import fleet
from fleet.cli.runtime import runtime_folder
from fleet.errors import UsageError
from fleet.messages import JobEnded
from fleet.notebook.gang import Event, Gang, Interrupted
from fleet.notebook.round import CellError, RanksLost
from fleet.values import RankStatus
from tests.chaos.commands import fleet as finished
from tests.chaos.place import Place


@contextmanager
def interrupted_once_there(*files: Path) -> Iterator[None]:
    """Sends SIGINT to this process as each fifo is written to."""

    def wait() -> None:
        for file in files:
            file.read_text()
            os.kill(os.getpid(), signal.SIGINT)

    for file in files:
        os.mkfifo(file)
    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def test_calls_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fleet.Cluster(workers=3) as cluster:
        returns(cluster)
        assert capsys.readouterr() == ("", "")
        prints(cluster, capsys)
        refuses(cluster)
        is_stubborn(cluster, tmp_path, capsys)
        ends_with_0(cluster, tmp_path, capsys)
        loses_its_place(cluster, capsys)
    assert repr(cluster) == "<fleet.Cluster of 3 ranks: 3 ranks closed>"
    with pytest.raises(UsageError, match="closed"):
        cluster.run("1")


def returns(cluster: fleet.Cluster) -> None:
    assert cluster.run("x = 10 * rank") == [None] * 3
    assert cluster.run("x + 1") == [1, 11, 21]
    array = np.arange(200_000.0)
    for double in cluster.run(lambda a, by=1: a * by, array, by=2):
        np.testing.assert_array_equal(double, array * 2)
    cluster.run("class Point:\n    def __init__(self, x): self.x = x")
    assert cluster.run("comm.broadcast_object(Point(7) if rank == 0 else None).x") == [7, 7, 7]
    assert cluster.run(lambda: fleet.init().world_size) == [3, 3, 3]
    assert re.fullmatch(r"0\| '0'\n1\| '1'\n2\| '2'", repr(cluster.cell("str(rank)")))
    assert cluster.cell("rank;") is None
    assert repr(cluster) == "<fleet.Cluster of 3 ranks: 3 ranks idle>"
    assert cluster._repr_html_().count("<td>idle</td>") == 3


def prints(cluster: fleet.Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    cluster.run("import sys\nfor i in range(5000): print(i)\nprint('end', end='')\nprint('to stderr', file=sys.stderr)")
    out, err = capsys.readouterr()
    assert lines_by_rank(out, 3) == [[*map(str, range(5000)), "end"]] * 3
    assert lines_by_rank(err, 3) == [["to stderr"]] * 3
    cluster.run(
        "import threading\nlater = threading.Event()\nt = threading.Thread(target=lambda: [later.wait(), print('later')])"
    )
    cluster.run("t.start()\nlater.set()\nt.join()")
    assert lines_by_rank(capsys.readouterr().out, 3) == [["later"]] * 3
    cluster.run("print('nul \\0 and \\0end')")
    assert lines_by_rank(capsys.readouterr().out, 3) == [["nul \0 and \0end"]] * 3


def refuses(cluster: fleet.Cluster) -> None:
    with pytest.raises(CellError, match="all 3 ranks failed: SystemExit: 3"):
        cluster.run("raise SystemExit(3)")
    with pytest.raises(CellError, match=r"all 3 ranks failed: ValueError: two$") as noted:
        cluster.run("e = ValueError('two\\nlines')\ne.add_note('and a note')\nraise e")
    shown = noted.value._render_traceback_()
    assert shown[-4:] == ["ValueError: two", "lines", "and a note", "all 3 ranks failed: ValueError: two"]
    with pytest.raises(CellError, match="cannot be pickled"):
        cluster.run("(rank for _ in ())")
    with pytest.raises(
        CellError, match=r"rank ([12]) failed: KeyError: \1\nrank ([12]) failed too: KeyError: \2"
    ) as caught:
        cluster.run("comm.barrier()\nif rank: raise KeyError(comm.barrier() if 0 else rank)")
    assert caught.value.rank in (1, 2)
    assert caught.value.traceback.startswith('Traceback (most recent call last):\n  File "<cell ')
    with pytest.raises(SyntaxError):
        cluster.run("1 +")
    for wrong in ({"workers": "2"}, {"workers": 2.5}, {"workers": 0}, {"workers": 1, "timeout_s": -1.0}):
        with pytest.raises(UsageError, match="must be"):
            fleet.Cluster(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="1000 GPUs are asked for"):
        fleet.Cluster(2, gpus=500)
    with pytest.raises(UsageError, match="of type int"):
        cluster.run(5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no arguments"):
        cluster.run("rank", 3)
    assert cluster.run("x") == [0, 10, 20]


def is_stubborn(cluster: fleet.Cluster, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second interrupt kills ranks that do not mind the first one."""
    first, second = folder / "first", folder / "second"
    with interrupted_once_there(first, second), pytest.raises(KeyboardInterrupt, match="killed"):
        cluster.run(
            "import time\n"
            f"files = [{str(first)!r}, {str(second)!r}]\n"
            "while True:\n"
            "    try:\n"
            "        if rank == 0 and files: open(files.pop(0), 'w').close()\n"
            "        time.sleep(60)\n"
            "    except KeyboardInterrupt: pass\n"
        )
    capsys.readouterr()
    assert cluster.run("'x' in globals()") == [False] * 3
    assert capsys.readouterr() == ("", "")  # the interrupt has told of it


def ends_with_0(cluster: fleet.Cluster, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank that ends is lost, whatever its exit code, in a call and between two."""
    with pytest.raises(RanksLost, match=r"rank 1 failed \(.*\): exit code 0, which nobody had asked of it"):
        cluster.run("import os\nif rank == 1: os._exit(0)")
    os.mkfifo(folder / "end")
    cluster.run(f"import os, threading\ndef end(): open({str(folder / 'end')!r}).close(), os._exit(0)")
    cluster.run("if rank == 1: threading.Thread(target=end).start()")
    (folder / "end").write_text("")
    while "idle" in repr(cluster):
        time.sleep(0.01)  # a process that has died sends this one no event
    assert cluster.run("rank") == [0, 1, 2]
    assert "exit code 0, which nobody had asked of it" in capsys.readouterr().err


def loses_its_place(cluster: fleet.Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """The process that has the slots is killed: the next call has a new one."""
    [slots] = [p for p in psutil.Process().children() if "local-slots" in p.cmdline()]
    ranks = slots.children(recursive=True)
    slots.kill()
    psutil.wait_procs(ranks, 20)
    while "idle" in repr(cluster):
        time.sleep(0.01)  # a process that has died sends this one no event
    assert cluster.run("rank") == [0, 1, 2]
    assert "was killed by signal 9; new ranks" in capsys.readouterr().err


@pytest.mark.chaos
def test_calls_on_a_cluster(tmp_path: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        place.start_worker(name)
        place.wait_for_worker(name)
    with fleet.Cluster(workers=4, timeout_s=60) as cluster:
        cluster.run("x = rank\nprint(rank)")
        out = capsys.readouterr().out
        assert out[0] in "ab"  # the worker's name
        assert lines_by_rank(out, 4) == [["0"], ["1"], ["2"], ["3"]]
        array = np.arange(200_000.0)
        np.testing.assert_array_equal(cluster.run(lambda a: a + 1, array)[3], array + 1)

        place.kill(place.orchestrator)
        place.start_orchestrator()
        assert cluster.run("import numpy as np\nn = np.array([x])\ncomm.all_reduce(n)\nint(n[0])") == [6] * 4
        with (
            interrupted_once_there(tmp_path / "there"),
            pytest.raises(KeyboardInterrupt, match=r"rank 0 in .* ranks 1-3 in"),
        ):
            cluster.run(
                f"if rank: comm.barrier()\nopen({str(tmp_path / 'there')!r}, 'w').close()\nimport time; time.sleep(60)"
            )
        assert cluster.run("x") == [0, 1, 2, 3]


class Reacts(io.StringIO):
    """A stderr that does something as soon as a text is written to it: one after the other."""

    def __init__(self, *reactions: tuple[str, Callable[[], object]]) -> None:
        super().__init__()
        self._left = list(reactions)

    def write(self, text: str) -> int:
        if self._left and self._left[0][0] in text:
            self._left.pop(0)[1]()
        return super().write(text)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.chaos
def test_calls_whose_ranks_do_not_come(tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call ends where its ranks wait for slots, end before they begin it, or cannot be asked any more. None is run again."""

    def call(*reactions: tuple[str, Callable[[], object]]) -> str:
        monkeypatch.setattr(sys, "stderr", Reacts(*reactions))
        with pytest.raises((KeyboardInterrupt, RanksLost)) as caught:
            cluster.run("import time; time.sleep(60)")
        return f"{caught.typename}: {caught.value}"

    def cancel() -> None:
        known = {"ORCHESTRATOR_ADDR": place.address, "FLEET_SECRET_FILE": str(tmp_path / "secret")}
        assert finished("cancel", cluster._ranks.gang.job_id, **known).returncode == 0

    for name in ("LEAVE_AFTER_S", "SAY_WAITING_AFTER_S"):
        monkeypatch.setattr(f"fleet.notebook.round.{name}", 0.2)
    with fleet.Cluster(workers=2) as cluster:
        waits = "the ranks wait"
        assert "CellInterrupted: the ranks were killed; with the next cell" in call((waits, interrupt))
        assert "cancelled" in call((waits, cancel), (waits, interrupt))
        left = call(
            (waits, lambda: place.kill(place.orchestrator)), (f"lost the orchestrator at {place.address}", interrupt)
        )
        assert f"CellInterrupted: the orchestrator at {place.address} did not answer" in left
        assert f"CellInterrupted: the orchestrator at {place.address} did not answer" in call(
            ("no orchestrator answers", interrupt)
        )
        place.start_orchestrator()
        assert "CellInterrupted: the ranks were killed" in call((waits, interrupt))


def test_ranks_that_never_begin_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are started once more, and not again and again; not at all after an interrupt, or where nothing had started."""
    calls: list[list[Event]] = []

    def call(gang: Gang, number: int, packed: object) -> None:
        for event in calls.pop(0):
            gang.events.put(event)

    def made() -> str:
        with pytest.raises((KeyboardInterrupt, RanksLost)) as caught:
            cluster.run("1")
        assert not calls  # no call was made once more than is allowed, nor once less
        return f"{caught.typename}: {caught.value}"

    monkeypatch.setattr(Gang, "call", call)
    idle = JobEnded("job", "", 0, (RankStatus(0, "w", "h", 1, 7, task=0),))
    with fleet.Cluster(workers=1) as cluster:
        calls += [idle], [idle]
        assert "exit code 7" in made()
        calls.append([Interrupted(), idle])
        assert made().startswith("CellInterrupted: ")
        calls.append([JobEnded("job", "it was cancelled", -1)])
        assert "it was cancelled" in made()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with ExitStack() as stack:
        place = Place(stack, tmp_path)
        monkeypatch.setenv("ORCHESTRATOR_ADDR", place.address)
        monkeypatch.setenv("FLEET_SECRET_FILE", str(tmp_path / "secret"))
        yield place
    with runtime_folder():
        pass
