"""`fleet why`: the question to a cluster's orchestrator, or to those that are embedded in each `fleet run` of this user."""

from __future__ import annotations

import json

from fleet.bus.folders import own_folders
from fleet.bus.lock import Lock
from fleet.client.rank_activity import Activity, as_values, ask, described
from fleet.client.target import Target
from fleet.errors import ConfigError, UsageError

LOCAL_WITHIN_S = 2.0
RECENT, RECENT_IN_JSON = 3, 20  # collectives of each rank: a screen shows eight ranks


def explain(job_id: str, count: int | None, target: Target | None, as_json: bool, stacks: bool = False) -> str:
    """Activity of the ranks of a job, in words or as JSON. Raises ConfigError, UsageError.

    `count` is the number of each rank's last collectives; None: what suits either.
    """
    found = activities(job_id, target, stacks=stacks)
    if count is None:
        count = RECENT_IN_JSON if as_json else RECENT
    if as_json:
        told = [rank for f in found for rank in as_values(f.answers, f.silent, count, f.straggler)]
        return json.dumps(told, indent=1)
    several = len(found) > 1
    return "\n".join(
        (f"job {f.answers[0].job_id}\n" if several and f.answers else "")
        + described(f.answers, f.silent, count, f.straggler)
        for f in found
    )


def targets_here() -> list[Target]:
    """Clusters that are embedded in each `fleet run` of this user on this machine; some may be left by killed ones."""
    sockets = [folder / "orchestrator" for folder in own_folders()]
    return [
        Target("this machine", f"ipc://{socket}", Lock(), LOCAL_WITHIN_S, local=True)
        for socket in sockets
        if socket.is_socket()
    ]


def activities(job_id: str, target: Target | None, trace_s: float = 0.0, stacks: bool = False) -> list[Activity]:
    """Answers of the ranks of a job; without a cluster, of this user's jobs on this machine. See rank_activity.ask."""
    if target is not None:
        return [ask(target, job_id, trace_s, stacks)]
    found, reasons = [], []
    for local in targets_here():
        try:
            found.append(ask(local, job_id, trace_s, stacks))
        except UsageError as error:
            reasons.append(str(error))
        except ConfigError:
            continue  # left by a killed one
    if found:
        return found
    if not reasons:
        raise UsageError("no job runs on this machine; set ORCHESTRATOR_ADDR to ask a cluster's orchestrator")
    running = [name for reason in reasons if (name := reason.partition("running: ")[2])]
    runs = f"running: {', '.join(running)}" if running else "no job runs"
    what, _, rest = next((reason for reason in reasons if "is unknown here" not in reason), reasons[0]).partition("; ")
    raise UsageError(f"{what}; {runs if rest == 'no job runs' or rest.startswith('running: ') else rest}")
