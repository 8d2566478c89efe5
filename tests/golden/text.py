"""Messages as text: what each says beyond the defaults of its fields, in one line."""

from __future__ import annotations

from typing import Any

import msgspec

from fleet import messages as m

# Fields that tell a reader nothing of the protocol, or are the same in every scenario.
HIDDEN = {
    "versions",
    "incarnation",
    "numbering",
    "pid",
    "storage_id",
    "port",
    "master_addr",
    "master_port",
    "bind",
    "load",
}
HIDDEN |= {
    "advertise",
    "security",
    "secret",
    "memory",
    "group_rank",
    "group_count",
    "hosts",
    "host",
    "question",
    "address",
}
HIDDEN |= {"heartbeat_s", "communicator_id"}


def told(message: m.Message) -> str:
    """Such as `Assign train attempt=2 member_ids=0,1`. The job has no name before it; a first attempt is not said."""
    said = [type(message).__name__]
    for field in msgspec.structs.fields(message):
        value = getattr(message, field.name)
        if field.name == "job_id":
            said += [value] if value else []
        elif isinstance(message, m.MemberLost) and field.name == "reason":
            continue  # its status says it
        elif not (
            field.name in HIDDEN or value in (field.default, "", (), -1) or (field.name, value) == ("attempt", 1)
        ):
            said.append(f"{field.name}={_shown(value)}")
    return " ".join(said)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"({_shown(each)})" if isinstance(each, tuple) else _shown(each) for each in value)
    if isinstance(value, bytes):
        return repr(value.decode())
    if isinstance(value, m.RankStatus):
        return f"(member {value.member_id} on {value.worker_id}: {m.how(value)}{', stopped' * value.stopped})"
    if isinstance(value, m.World):
        return f"({', '.join(f'member {each.member_id} on {each.worker_id}' for each in value.members)})"
    if isinstance(value, m.WorkerState):
        return f"({value.worker_id}: {value.state}, {value.busy} of {value.slots} slots busy)"
    if isinstance(value, m.JobInfo):
        return f"({value.job_id}: {value.status}{f', waits for {value.waits_for}' * bool(value.waits_for)})"
    if isinstance(value, m.Spec):
        return f"({' '.join(filter(None, (value.kind, value.target, value.digest[:8])))})"
    if isinstance(value, str) and len(value) == 64:
        return value[:8]  # of a digest
    if isinstance(value, msgspec.Struct):
        names = [(field.name, field.default) for field in msgspec.structs.fields(value)]
        changed = [(name, getattr(value, name)) for name, default in names if getattr(value, name) not in (default, "")]
        return f"({' '.join(f'{name}={_shown(each)}' for name, each in changed)})"
    return repr(value) if " " in str(value) else str(value)
