"""`fleet.Cluster`: ranks that stay alive between calls, for notebooks and prompts."""

from __future__ import annotations

import html
import queue
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from types import TracebackType
from typing import Any

from msgspec.structs import replace

from fleet import config
from fleet import messages as m
from fleet.client.call_packer import CallPacker, PackedCall
from fleet.client.caller_code import cluster_place
from fleet.client.executor import MAX_BUNDLE
from fleet.client.local_cluster import Place, check_gpus, local_place
from fleet.client.output_sequence import OutputSequence
from fleet.client.target import cluster_target
from fleet.errors import ConfigError, FleetError, UsageError, rank_set
from fleet.notebook import cells
from fleet.notebook.gang import Event, Gang, Interrupted, Present
from fleet.notebook.round import CellInterrupted, NeverBegun, RanksLost, Round, how_it_ended
from fleet.text import shown
from fleet.values import JobOptions
from fleet.versions import versions

NEW_RANKS = "new ranks take their place, without the variables of the cells before"


class Shown:
    """What a cell shows of its last expression: equal texts of ranks once."""

    def __init__(self, texts: list[str | None]) -> None:
        self._texts = texts

    def __repr__(self) -> str:
        groups: dict[str, list[int]] = {}
        for rank, text in enumerate(self._texts):
            if text is not None:
                groups.setdefault(text, []).append(rank)
        size = len(self._texts)
        return "\n".join(
            f"{rank_set(ranks, size)}| {line}" for text, ranks in groups.items() for line in text.split("\n")
        )


class _Ranks:
    """The ranks of a Cluster, and what is known of them. Outlives the Cluster object by its own end."""

    def __init__(self, place: Callable[[], AbstractContextManager[Place]], size: int, options: JobOptions) -> None:
        self.size = size
        self._enter = place
        self._held = ExitStack()
        self._options = options
        self._early: deque[Event] = deque()  # events that came between two calls
        self._place = self._held.enter_context(place())
        self._begin()

    def begin_again(self) -> None:
        """New ranks in the place of these."""
        self.gang.close()
        if isinstance(self.end, BaseException):
            self._held.close()
            self._place = self._held.enter_context(self._enter())
        self._begin()

    def close(self) -> None:
        self.gang.close()
        self._held.close()

    def _begin(self) -> None:
        self.gang = Gang(self._place, self.size, self._options)
        self.sequence = OutputSequence()
        self.pids = [0] * self.size
        self.workers: tuple[str, ...] = ()
        self.again = False  # whether the ranks have to meet again
        self.end: m.JobEnded | BaseException | None = None  # of the ranks
        self.told = False  # whether a person knows of it
        self._early.clear()

    def name_of(self, rank: int) -> str:
        """With its worker, where that tells a person something."""
        return str(rank) if self._place.target.local or not self.workers else f"{shown(self.workers[rank])}:{rank}"

    def look(self) -> None:
        """Takes what has come since the last call."""
        while True:
            try:
                event = self._noted(self.gang.events.get_nowait())
            except queue.Empty:
                return
            if not isinstance(event, Interrupted):  # that was of the last call, and came after its end
                self._early.append(event)

    def next_event(self, wait_s: float | None) -> Event | None:
        """The next event; None: there is none within this time."""
        if self._early:
            return self._early.popleft()
        try:
            return self._noted(self.gang.events.get(timeout=wait_s))
        except queue.Empty:
            return None

    def _noted(self, event: Event) -> Event:
        if isinstance(event, Present):
            self.pids[event.member_id] = event.pid
        elif isinstance(event, m.Started):
            self.workers = event.workers
        elif isinstance(event, m.JobEnded | BaseException):
            self.end, self.told = event, False
        return event


class Cluster:
    """`workers` ranks that stay alive between calls: on this machine, or on the cluster at `addr` (else ORCHESTRATOR_ADDR).

    `workers` is by default the number of cores. Each rank takes `slots` slots and `gpus` GPUs of its worker until `close`.
    The ranks share a namespace each, in which `comm`, `rank` and `world_size` are; `timeout_s` is the deadline of each
    collective. What ranks print is shown as by `fleet run`: whole lines, equal ones of many ranks once.

    A call that fails on one rank is interrupted on the others after a second; the ranks live on, and `comm` is a new
    communicator in the next call. So is Ctrl-C, which interrupts all ranks; a second one kills them. A rank that dies takes
    the others with it: the next call says so, and has new ranks without the variables of the last ones.
    The first call raises ConfigError where the cluster does not answer within `connect_timeout` seconds.
    """

    def __init__(
        self,
        workers: int | None = None,
        addr: str | None = None,
        *,
        slots: int = 1,
        gpus: int = 0,
        timeout_s: float = 30.0,
        insecure: bool = False,
        connect_timeout: float = 60.0,
    ) -> None:
        size = config.usable_cores() if workers is None else workers
        if not all(isinstance(number, int) for number in (size, slots, gpus)) or size < 1 or slots < 1 or gpus < 0:
            raise UsageError("workers and slots must be whole numbers of at least 1, gpus of at least 0")
        if timeout_s <= 0:
            raise UsageError(f"timeout_s is {timeout_s}: it must be above 0")
        address = addr or config.orchestrator_address()
        if address is None:
            check_gpus(size * gpus)
        python = "" if address is None else versions().python_minor
        options = JobOptions(name="notebook", max_restarts=0, slots=slots, gpus=gpus, python=python)
        self.timeout_s = timeout_s
        self._numbers = count(1)
        self._calling = threading.Lock()
        self._packer = CallPacker(None)

        @contextmanager
        def place() -> Iterator[Place]:
            if address is None:
                found = local_place(size * slots, size * gpus)
            else:
                found = cluster_place(cluster_target(address, None, insecure, connect_timeout), MAX_BUNDLE << 20)
            with found as p:
                # Through the relay, on this machine too.
                yield Place(p.target, "", replace(p.spec, target="notebook"), p.bundle, p.ended)

        self._ranks = _Ranks(place, size, options)
        self._end = weakref.finalize(self, self._ranks.close)

    def run(self, what: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """Runs code, or calls a function with these arguments, on every rank. Returns what each rank has: the value of the
        last expression, or of the function.

        Code sees the variables of the ranks; a function comes from here, with copies of what it uses. Raises CellError,
        which names the first rank that failed, with its traceback; KeyboardInterrupt once all ranks were interrupted;
        SyntaxError and UsageError, and then nothing has run.
        """
        if callable(what):
            function = what
            endings = self._make(
                lambda start: self._packer.pack(cells.run_function, (start, function, args, kwargs), {})
            )
        elif not isinstance(what, str):
            raise UsageError(f"a Cluster runs code as a str, or a function: this is of type {type(what).__name__}")
        elif args or kwargs:
            raise UsageError("code takes no arguments, only a function does")
        else:
            endings = self._run_source(what, False)
        return [ending.value for ending in endings]

    def cell(self, source: str) -> Shown | None:
        """Runs code as a notebook does. Returns what is to be seen of the last expression's values, if there are any."""
        texts = [ending.value for ending in self._run_source(source, True)]
        return None if all(text is None for text in texts) else Shown(texts)

    def close(self) -> None:
        """Ends the ranks. Happens by itself at exit."""
        self._end()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self._ranks.size

    def _run_source(self, source: str, shows: bool) -> list[cells.Ending]:
        def pack(start: cells.Start) -> PackedCall:
            return self._packer.pack(cells.run_source, (start, source, f"<cell {start.number}>", shows), {})

        compile(source, "<cell>", "exec", dont_inherit=True)  # a SyntaxError is raised here, and nothing runs
        return self._make(pack)

    def _make(self, pack: Callable[[cells.Start], PackedCall]) -> list[cells.Ending]:
        """Makes a call on all ranks."""
        if not self._end.alive:
            raise UsageError("this Cluster is closed: make another one")
        if not self._calling.acquire(blocking=False):
            raise UsageError("this Cluster runs a call already: wait for its end")
        try:
            try:
                called = self._called(pack)
            except NeverBegun:
                self._ranks.told = False
                called = self._called(pack)
        finally:
            self._calling.release()
        failure = called.error()
        if failure is not None:
            raise failure
        return [called.endings[rank] for rank in range(len(self))]

    def _called(self, pack: Callable[[cells.Start], PackedCall]) -> Round:
        """The call, which has ended on all ranks. Raises RanksLost; NeverBegun where it can be made again."""
        ranks = self._ranks
        self._replace_lost(ranks)
        number = next(self._numbers)
        packed = pack(cells.Start(number, ranks.again, self.timeout_s))
        called = Round(ranks.gang, ranks.size, number, ranks.sequence, ranks.name_of)
        try:
            ranks.gang.call(number, packed)
            with _interrupts(ranks.gang):
                called.run(ranks.next_event)
        except CellInterrupted as error:
            ranks.end, ranks.told = m.JobEnded(ranks.gang.job_id, str(error), -1), True
            raise CellInterrupted(f"{error}; with the next cell {NEW_RANKS}") from None
        except FleetError as error:
            ranks.told = True
            if isinstance(error, ConfigError):
                raise
            if called.interrupted:
                raise CellInterrupted(f"the ranks were killed; with the next cell {NEW_RANKS}") from None
            kind = NeverBegun if isinstance(error, NeverBegun) else RanksLost
            raise kind(f"{error}\nwith the next cell {NEW_RANKS}") from None
        except BaseException:
            ranks.told = True
            raise
        finally:
            packed.release()
        ranks.again = called.error() is not None
        if not all(ending.usable for ending in called.endings.values()):
            print(f"fleet: the ranks have not met; {NEW_RANKS}", file=sys.stderr)
            ranks.begin_again()
        return called

    def _replace_lost(self, ranks: _Ranks) -> None:
        """Where the last ranks have ended, says so, and begins new ones."""
        ranks.look()
        if ranks.end is None:
            return
        if not ranks.told:
            why = how_it_ended(ranks.end, ranks.size) if isinstance(ranks.end, m.JobEnded) else shown(str(ranks.end))
            print(f"fleet: {why}; {NEW_RANKS}", file=sys.stderr)
        ranks.begin_again()

    # For a person

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """(rank, worker, pid, state) of each rank."""
        ranks = self._ranks
        ranks.look()
        if not self._end.alive:
            states = ["closed"] * ranks.size
        elif ranks.end is not None:
            states = ["ended"] * ranks.size
        else:
            busy = "busy" if self._calling.locked() else "idle"
            states = [busy if pid else "starting" for pid in ranks.pids]
        workers = ranks.workers or ("",) * ranks.size
        return [(str(rank), workers[rank], str(ranks.pids[rank] or ""), states[rank]) for rank in range(ranks.size)]

    def __repr__(self) -> str:
        rows = self._rows()
        states: dict[str, list[int]] = {}
        for rank, _, _, state in rows:
            states.setdefault(state, []).append(int(rank))
        said = ", ".join(f"{rank_set(ranks, len(rows))} {state}" for state, ranks in states.items())
        return f"<fleet.Cluster of {len(rows)} ranks: {said}>"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("rank", "worker", "pid", "state"))
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows()
        )
        return f"<table><caption>fleet.Cluster</caption><tr>{head}</tr>{rows}</table>"


@contextmanager
def _interrupts(gang: Gang) -> Iterator[None]:
    """SIGINT is an event meanwhile, if this is the thread that has signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: gang.events.put(Interrupted()))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
