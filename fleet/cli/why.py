"""`fleet why`: which orchestrator to ask, that of a cluster or one embedded in a `fleet run` of this user."""

from __future__ import annotations

from pathlib import Path

from fleet.bus.folders import own_folders
from fleet.bus.lock import Lock
from fleet.client.target import Target, cluster_target
from fleet.client.why import ask, described
from fleet.errors import ConfigError, UsageError
from fleet.versions import versions

LOCAL_WITHIN_S = 2.0


def explain(
    job_id: str, count: int, orchestrator: str | None, secret_file: Path | None, insecure: bool, timeout_s: float
) -> str:
    """What the ranks of a job do, in words. Raises ConfigError, UsageError."""
    if orchestrator is not None:
        cluster = cluster_target(orchestrator, secret_file, insecure, timeout_s)
        return described(*ask(cluster, job_id, versions()), count)
    found, reasons = [], []
    for folder in own_folders():
        socket = folder / "orchestrator"
        if not socket.is_socket():
            continue
        local = Target("this machine", f"ipc://{socket}", Lock(), LOCAL_WITHIN_S, local=True)
        try:
            found.append(described(*ask(local, job_id, versions()), count))
        except UsageError as error:
            reasons.append(str(error))
        except ConfigError:
            continue  # left by a killed one
    if found:
        return "\n".join(found)
    raise UsageError(
        "; ".join(reasons) or "no job runs on this machine; set ORCHESTRATOR_ADDR to ask a cluster's orchestrator"
    )
