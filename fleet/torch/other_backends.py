"""Collectives of other backends than fleet in this rank's flight recorder, through torch's hooks (torch 2.14 and later).

`fleet why` shows them, and a time-out names the ranks that have not come. Carries out nothing, and changes no result.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from hashlib import blake2b
from threading import get_ident
from time import monotonic
from typing import Any

from torch import distributed as dist
from torch._C import _distributed_c10d as c10d

from fleet.collectives.diagnosis import Diagnosis
from fleet.collectives.header import ROOTED, pack_call
from fleet.collectives.init import session
from fleet.collectives.operation import END_UNKNOWN, Operation, Signature
from fleet.collectives.order import Order
from fleet.collectives.recorder import Recorder
from fleet.collectives.script_line import calling_frame
from fleet.collectives.session import Session
from fleet.config import rank_settings
from fleet.errors import FleetError
from fleet.torch.substitution import NAME, is_of_the_job

HOOK = 1  # torch keeps the hooks of each process group by number
GROUPS_AT_MOST = 64  # of one process, the last ones
SIGNATURES_KEPT = 4096

# fleet's names of torch's operations. The other ones are no collectives.
NAMES = {
    "ALLREDUCE": "all_reduce",
    "BROADCAST": "broadcast",
    "REDUCE": "reduce",
    "ALLGATHER": "all_gather",
    "REDUCE_SCATTER": "reduce_scatter",
    "ALLTOALL": "all_to_all",
    "BARRIER": "barrier",
    "SCATTER": "scatter",
    "GATHER": "gather",
}

log = logging.getLogger("fleet.torch")


class OtherGroup:
    """This rank's collectives in one process group whose backends are not fleet, or not all of them.

    It does not hold the process group, which holds its methods.
    """

    def __init__(self, group: Any, backends: dict[str, str], ours: Session) -> None:
        self._name, self._rank = group.group_name, group.rank()
        self._backends = backends
        self._session = ours
        others = "/".join(dict.fromkeys(name for name in backends.values() if name != NAME))
        desc = group.group_desc
        self.title = f"{others}, {desc if desc not in ('', 'undefined') else f'process group {self._name}'}"
        self.recorder = Recorder()
        # Odd, and the ids of fleet's communicators are even.
        self.group_id = int.from_bytes(blake2b(self._name.encode(), digest_size=7).digest(), "little") | 1
        self._under_way: dict[int, Operation] = {}  # by thread, from the call until its backend has taken it
        self._signatures: dict[Any, Signature] = {}
        self._has_failed = False

    def before(self, call: Any) -> None:
        """Called by torch before an operation, in the thread that calls it. Raises nothing: the script would get it."""
        try:
            self._begin(call)
        except Exception:
            log.warning("a collective of %s is not recorded", self.title, exc_info=True)

    def _begin(self, call: Any) -> None:
        self._under_way.pop(get_ident(), None)  # the backend has raised an error in place of taking that one
        name = NAMES.get(call.name.name)
        if name is None:
            return
        inputs, outputs = call.input_tensors, call.output_tensors
        tensors = inputs or outputs
        device = tensors[0].device.type if tensors else ""
        if self._backends.get(device) == NAME:
            return  # fleet records it
        frame, last = calling_frame(sys._getframe(1)), self.recorder.last
        signature = self._signature(name, inputs, outputs, device, call.root)
        operation = Operation(signature, monotonic(), 0.0, frame.f_code, frame.f_lineno)
        operation.sequence = last.sequence + 1 if last is not None else 1
        operation.ended = END_UNKNOWN  # it does not run until its backend has taken it, which may refuse it
        self.recorder.operations.append(operation)
        if device in ("", "cpu"):  # to ask for the end of work on a GPU breaks the capture of a CUDA graph
            self._under_way[get_ident()] = operation

    def after(self, call: Any) -> None:
        """Called by torch once the backend has taken the operation, in the same thread. Raises nothing, as `before`."""
        try:
            if call.name.name in NAMES and (operation := self._under_way.pop(get_ident(), None)) is not None:
                self._follow(operation, call.work)
        except Exception:
            log.warning("the end of a collective of %s is not recorded", self.title, exc_info=True)

    def _follow(self, operation: Operation, work: Any) -> None:
        try:
            future = work.get_future()
        except RuntimeError:  # Gloo's reduce_scatter has none
            return
        operation.ended = 0.0
        future.add_done_callback(partial(self._done, operation))

    def _signature(self, name: str, inputs: Any, outputs: Any, device: str, root: int) -> Signature:
        """What this rank has called, with the shape where the tensors of all ranks have the same one."""
        mine, others = (outputs, inputs) if name in ("scatter", "reduce_scatter") else (inputs, outputs)
        dtype = mine[0].dtype if mine else None
        shapes = tuple(x.shape for x in mine)
        is_alike = name != "all_to_all" and len({x.shape for x in others}) <= 1
        key = name, dtype, shapes, is_alike, device, root
        found = self._signatures.get(key)
        if found is None:
            text = str(dtype).removeprefix("torch.") if mine else ""
            if is_alike:
                text = " ".join(f"{text}{list(shape)}" for shape in shapes)
            if name in ROOTED:
                text += f", {ROOTED[name]}={root}"
            backend = self._backends.get(device) or self.title.partition(",")[0]
            if len(self._signatures) >= SIGNATURES_KEPT:
                self._signatures.clear()
            found = self._signatures[key] = Signature(pack_call(name), text=f"{name}({text}) of {backend}")
            found.byte_count = sum(x.numel() * x.element_size() for x in mine)
        return found

    def _done(self, operation: Operation, future: Any) -> None:
        """Called by torch in a thread of the backend, before the script has the result or the error."""
        operation.ended = monotonic()
        try:
            future.wait()
        except Exception as error:  # of whatever type the backend raises; the script gets it from torch
            if "timed out" in str(error).lower() and not self._has_failed:
                self._has_failed = True
                self._explain(operation)

    def _explain(self, operation: Operation) -> None:
        """Says in the output which ranks have not come, or have called something else."""
        operation.limit_s = round(operation.ended - operation.started, 1)
        members = dist.get_process_group_ranks(c10d._resolve_process_group(self._name))
        order = Order(members, self.group_id)
        order.recorder = self.recorder
        diagnosis = Diagnosis(self._rank, order, partial(self._session.inquire, None))
        error = diagnosis.explain(operation, TimeoutError())
        print(f"fleet: {error}", file=sys.stderr, flush=True)


def watch(group: Any) -> None:
    """Records the collectives of a new process group from now on, if it is of the job's ranks. Never an error of the script."""
    world: Any = dist.group.WORLD if dist.is_initialized() else group
    place = rank_settings()
    if place is None or not is_of_the_job(world.rank(), world.size()):
        return
    backends = {device.type: group._get_backend(device).name() for device in group._device_types}
    try:
        ours = session(place)
    except FleetError as error:  # another process of this rank has it
        log.debug("collectives of %s are not recorded: %s", group.group_name, error)
        return
    if ours is None or set(backends.values()) <= {NAME}:
        return
    other = OtherGroup(group, backends, ours)
    group.register_pre_hook(HOOK, other.before)
    group.register_post_hook(HOOK, other.after)
    known = ours.flights.others
    known.append((other.group_id, other.title, other.recorder))
    del known[:-GROUPS_AT_MOST]
