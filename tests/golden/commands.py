"""Commands of a scenario: what they do to a cluster."""

from __future__ import annotations

from hashlib import sha256

from msgspec import convert

from fleet import messages as m
from fleet.worker import state as w
from tests.golden.cluster import BUNDLE, Cluster


def run(cluster: Cluster, command: str) -> list[str]:
    """Lines that come of one command."""
    cluster.lines = []
    cluster.heartbeats.clear()
    fields = dict(word.split("=") for word in command.split() if "=" in word)
    match [word for word in command.split() if "=" not in word]:
        case ["tick", seconds]:
            cluster.tick(cluster.now + float(seconds))
        case [name, "starts"]:
            cluster.start(name, int(fields["slots"]))
        case [name, "connects"]:
            cluster.connect(name)
        case [name, "loses", "its", "connection"]:
            cluster.cut(name)
        case [name, "dies"]:  # with all processes that it started
            cluster.die(name)
        case [name, "freezes"]:  # and its connection stays up
            cluster.frozen[name] = []
        case [name, "goes", "on"]:
            cluster.events += [(name, event) for event in [*cluster.frozen.pop(name), w.Tick()]]
        case [name, "is", "told", "to", "leave"]:  # by SIGTERM
            cluster.events.append((name, w.Shutdown(drain=True)))
        case ["orchestrator", "restarts"]:
            cluster.restart_orchestrator()
        case ["member", number, "of", job_id, *words]:
            _member(cluster, cluster.process(job_id, int(number)), words, fields)
        case [name, "submits", job_id, *words]:
            kind, target = ("tasks", "") if "tasks" in words else ("script", "train.py")
            submit = {"job_id": job_id, "world_size": fields.pop("ranks", 1), "spec": {"kind": kind, "target": target}}
            if "bundle" in words:
                submit["spec"] |= {"digest": sha256(BUNDLE).hexdigest(), "bundle_bytes": len(BUNDLE), "keep": ["*.pt"]}
            submit |= {"again": "again" in words, "detached": "detached" in words, "options": fields}
            cluster.say(name, "orchestrator", convert(submit, m.Submit, strict=False))
        case [name, "reads", path, "of", job_id, "on", worker_id]:
            cluster.say(name, "orchestrator", m.ReadFile(job_id, worker_id, path.encode(), 0, question=1))
        case [name, "says", kind, *about]:  # any other message of a client: the first fields by their place
            cluster.peers.setdefault(name, name.encode())
            message = getattr(m, kind)
            values = dict(zip(message.__struct_fields__, about, strict=False)) | fields
            cluster.say(name, "orchestrator", convert(values, message, strict=False))
        case _:
            raise ValueError(f"no such command: {command}")
    cluster.settle()
    said = ", ".join(f"{count} of {name}" for name, count in sorted(cluster.heartbeats.items()))
    return [*cluster.lines, f"(heartbeats: {said})"] if said else cluster.lines


def _member(cluster: Cluster, key: w.Key, words: list[str], fields: dict[str, str]) -> None:
    match words:
        case ["calls", "fleet.init()"]:
            cluster.say_to_agent(key, m.RankHello(*key, 7))
        case ["prints", text]:
            cluster.events.append((cluster.processes[key], w.Printed(key, "stdout", f"{text}\n".encode())))
        case ["exits"]:
            cluster.exit(key, int(fields.get("code", 0)), int(fields.get("signal", 0)))
        case ["ignores", "SIGTERM"]:
            cluster.deaf.add(key)
        case ["says", kind]:  # any other message
            place = dict(zip(("job_id", "attempt", "member_id"), key, strict=True))
            cluster.say_to_agent(key, convert(place | fields, getattr(m, kind), strict=False))
        case _:
            raise ValueError(f"a member does not do this: {' '.join(words)}")
