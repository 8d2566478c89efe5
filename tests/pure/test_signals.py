"""Signals to processes that run as another user, as a rank does that runs a set-uid program."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from fleet.worker.children import signal_group, signal_process

OTHER = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process as another user")
def test_what_may_not_be_signalled_is_told() -> None:
    process = subprocess.Popen(["sleep", "30"], start_new_session=True)
    try:
        pid = os.fork()
        if pid == 0:
            os.setresuid(OTHER, OTHER, OTHER)
            answers = [
                signal_group(process.pid, signal.SIGKILL, with_leader=True),
                signal_group(process.pid, signal.SIGKILL, with_leader=False),
                signal_process(process.pid, signal.SIGKILL),
            ]
            os._exit(int(any(answers)))
        assert os.waitpid(pid, 0)[1] == 0
        assert process.poll() is None
        assert signal_group(process.pid, signal.SIGKILL, with_leader=True)
        assert process.wait() == -signal.SIGKILL
        assert signal_group(process.pid, signal.SIGKILL, with_leader=True), "that has ended is no error"
    finally:
        process.kill()
        process.wait()
