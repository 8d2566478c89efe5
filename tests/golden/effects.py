"""Effects of the cores, carried out as the shells do it: with disks that take everything, and processes that obey."""

from __future__ import annotations

from pathlib import Path
from signal import SIGTERM, Signals
from typing import TYPE_CHECKING, Any

from fleet import messages as m
from fleet.orchestrator import state as o
from fleet.worker import state as w
from tests.golden.text import told

if TYPE_CHECKING:
    from tests.golden.cluster import Cluster


def of_orchestrator(cluster: Cluster, effect: o.Effect) -> None:
    if isinstance(effect, o.Send) and effect.peer in cluster.peers.values():
        cluster.say("orchestrator", effect.peer.decode().partition("/")[0], effect.message)
    elif isinstance(effect, o.Log) and effect.level == "warning":
        cluster.lines.append(f"orchestrator warns: {effect.text}")
    elif isinstance(effect, o.KeepOutput):
        cluster.lines.append(f"orchestrator keeps what member {effect.member_id} of {effect.job_id} printed")
    elif isinstance(effect, o.FetchBundle):
        cluster.say("orchestrator", effect.peer.decode().partition("/")[0], m.Want(effect.digest, 0))
    elif isinstance(effect, o.ToFiles) and isinstance(effect.message, m.Part):
        cluster.lines.append("orchestrator keeps the bundle")
        cluster.bundle = effect.message
        cluster.events.append(("orchestrator", o.BundleStored(effect.message.digest)))
    elif isinstance(effect, o.ToFiles):
        cluster.say("orchestrator", effect.peer.decode().partition("/")[0], cluster.bundle)


def of_worker(cluster: Cluster, name: str, effect: w.Effect) -> None:
    if isinstance(effect, w.ToOrchestrator) and name in cluster.peers:
        cluster.say(name, "orchestrator", effect.message)
    elif isinstance(effect, w.ToRank):
        cluster.lines.append(f"{name} -> member {effect.peer.decode().split(' ')[1]}: {told(effect.message)}")
    elif isinstance(effect, w.WelcomeRank):
        key = effect.key
        cluster.lines.append(f"{name} -> member {key[2]}: RankWelcome")
        cluster.say_to_agent(key, m.Join(*key, 7, f"tcp://host-of-{name}:{50100 + key[2]}"))
    elif isinstance(effect, w.ToFiles):
        _files(cluster, name, effect.message)
    elif isinstance(effect, w.Spawn):
        cluster.lines.append(f"{name} starts member {effect.key[2]} of {effect.key[0]}")
        cluster.processes[effect.key] = name
        cluster.events.append((name, w.Spawned(effect.key, 7)))
    elif isinstance(effect, w.SignalGroup) and effect.key in cluster.processes:
        cluster.lines.append(f"{name} sends {Signals(effect.signal).name} to member {effect.key[2]} of {effect.key[0]}")
        if effect.signal != SIGTERM or effect.key not in cluster.deaf:
            cluster.exit(effect.key, 0, effect.signal)
    elif isinstance(effect, w.Gather):
        cluster.lines.append(f"{name} moves kept files of {effect.key[0]} from the working folder to the output folder")
        left = m.Left(*effect.key, 3, 12_000, ("cache/",))
        cluster.events.append((name, left))
    elif isinstance(effect, w.Exit):
        cluster.lines.append(f"{name} ends")
        cluster.die(name)


def _files(cluster: Cluster, name: str, message: w.ForFiles) -> None:
    if isinstance(message, m.Assign):
        cluster.assigned[name] = message
        if message.spec.digest:
            cluster.say(name, "orchestrator", m.Want(message.spec.digest, 0))
        else:
            _prepared(cluster, name)
    elif isinstance(message, m.Part):
        _prepared(cluster, name)
    elif isinstance(message, m.ListFiles):
        found = m.Files(message.job_id, message.worker_id, (m.FileInfo(b"model.pt", 5, 0),), **_numbers(message))
        cluster.events.append((name, found))
    elif isinstance(message, m.ReadFile):
        part = m.FilePart(
            message.job_id, message.worker_id, message.path, message.offset, b"model", **_numbers(message)
        )
        cluster.events.append((name, part))


def _prepared(cluster: Cluster, name: str) -> None:
    assign = cluster.assigned[name]
    cluster.lines.append(f"{name} prepares {assign.job_id}")
    cluster.events.append((name, w.Prepared((assign.job_id, assign.attempt), Path("/work"), 29500)))


def _numbers(ask: m.ListFiles | m.ReadFile) -> dict[str, Any]:
    return {"question": ask.question, "asker": ask.asker}
