"""Sessions of ranks: messages between ranks and the orchestrator, which pass through the agent. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from fleet import messages as m
from fleet.deadlines import Deadlines
from fleet.worker.effects import Effects
from fleet.worker.members import Members
from fleet.worker.state import Attempt, Key, Process, Settings, ToRank, WelcomeRank

RETRY_S = 0.5  # for messages that a rank did not read
FromSession = m.RankHello | m.Join | m.Ask | m.Answer | m.CollectiveCounts


@dataclass
class Sessions:
    """Invariant: a process is in `deadlines` if and only if messages are owed to it."""

    settings: Settings
    effects: Effects
    members: Members
    deadlines: Deadlines[Key] = field(default_factory=Deadlines)  # when owed messages are sent again

    def runner_of(self, job_id: str, member_id: int) -> bytes:
        """The connection of a task runner. Empty: this one is not here."""
        # A runner has one attempt: its client asks for another runner.
        process = self.members.find(job_id, 1, member_id)
        return process.runner if process is not None else b""

    def receive(self, peer: bytes, message: FromSession) -> None:
        process = self.members.find(message.job_id, message.attempt, message.member_id)
        if process is None:
            return
        if isinstance(message, m.CollectiveCounts):
            process.inside_since = self.effects.now - message.inside_s if message.inside_s else None
            m.add_counts(self.members.attempts[process.key[:2]].collectives, message.rows)
            if message.pace is not None:
                self.effects.send(replace(message, refused_count=0, made=None))
            if message.made is not None:
                process.made = message.made
                if process.status is not None:  # the exit was seen before the last message
                    self.members.tell_exit(process)
        elif isinstance(message, m.RankHello):
            self._hello(process, peer, message.pid)
        elif isinstance(message, m.Join):
            process.join = message
            self.effects.send(message)
        elif isinstance(message, m.Answer):
            self.effects.send(replace(message, host=self.settings.advertise))
        else:
            self.effects.send(message)

    def gone(self, peer: bytes) -> None:
        for process in self.members.processes():
            if process.peer == peer:
                process.holder = 0

    def _hello(self, process: Process, peer: bytes, pid: int) -> None:
        spec = self.members.attempts[process.key[:2]].assign.spec
        if spec.kind == "tasks" and not process.runner:
            process.runner = peer  # later connections are of tasks that call fleet.init()
            return
        if process.holder not in (0, pid):
            reason = (
                f"fleet.init() was called as rank {process.member_id} in pid {process.holder}, which runs beside this process "
                f'(pid {pid}), and each rank is one process: call it behind `if __name__ == "__main__":`, which a process of '
                "multiprocessing does not run"
            )
            self.effects.add(ToRank(peer, m.Refused(reason)))
            return
        process.peer, process.holder = peer, pid
        self.effects.add(WelcomeRank(peer, process.key, process.slot))

    def send(self, attempt: Attempt, message: m.Formed | m.MemberLost | m.Answer) -> None:
        """Sends a message to all ranks of an attempt, an answer only to the rank that asked."""
        failed = isinstance(message, m.MemberLost) and message.status.failed
        for process in attempt.processes.values():
            process.warned = process.warned or (failed and process.join is not None)
            if process.peer and (not isinstance(message, m.Answer) or message.asker == process.member_id):
                self.effects.add(ToRank(process.peer, message))

    def ask(self, attempt: Attempt, ask: m.Ask) -> None:
        """Asks all other ranks of an attempt. The agent answers for a process that has ended or has not called fleet.init()."""
        for process in attempt.processes.values():
            if process.member_id == ask.member_id:
                continue
            if process.peer and process.exit is None:
                self.effects.add(ToRank(process.peer, ask))
                continue
            if process.exit is not None:
                signal, code = process.exit.signal, process.exit.code
                doing = f"has ended by signal {signal}" if signal else f"has ended with code {code}"
            else:
                doing = "has not called fleet.init() yet" if process.pid else "is still starting"
            host = self.settings.advertise
            self.effects.send(
                m.Answer(
                    *attempt.key, ask.member_id, ask.question, process.member_id, host, process.pid, -1, False, doing
                )
            )

    def not_delivered(self, peer: bytes, message: m.Message) -> None:
        """Keeps a message that the rank must have, to send it again. Any other one is dropped: its asker may ask again."""
        for process in self.members.processes():
            if process.peer == peer and isinstance(message, m.RankWelcome | m.Formed | m.MemberLost):
                process.owed.append(message)
                self.deadlines.set(process.key, self.effects.now + RETRY_S)

    def say_again(self) -> None:
        """Sends again all that the orchestrator may have missed before its welcome."""
        for process in self.members.processes():
            if process.join is not None and process.status is None:
                self.effects.send(process.join)

    def forget(self, attempt: Attempt) -> None:
        self.deadlines.discard(*(process.key for process in attempt.processes.values()))

    def expire(self) -> None:
        for key in self.deadlines.due(self.effects.now):
            process = self.members.find(*key)
            assert process is not None, "an attempt is forgotten with its deadlines"
            owed, process.owed = process.owed, []
            for message in owed:
                self.effects.add(ToRank(process.peer, message))
