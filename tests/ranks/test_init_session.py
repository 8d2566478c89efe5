"""The session of a rank's process that fleet.init() and the records of other backends share."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Router
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller
from fleet.collectives import init
from fleet.config import RankSettings
from fleet.errors import CollectiveTimeout


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_failed_init_closes_the_session_only_if_it_made_it(tmp_path: Path, is_shared: bool) -> None:
    """It closed the one in which collectives of Gloo are recorded: nobody saw them from then on."""
    done = threading.Event()
    with Bus(Lock()) as bus:
        agent = Router(bus, f"ipc://{tmp_path}/agent")

        def serve() -> None:
            poller = Poller(agent.poll_sockets)
            while not done.is_set():
                poller.wait(0.1)
                for arrived in agent.receive():
                    if isinstance(arrived, Arrived) and isinstance(m.decode(arrived.data), m.RankHello):
                        agent.send(arrived.peer, m.encode(m.RankWelcome("tcp://127.0.0.1:*", "", "open", "")))

        thread = threading.Thread(target=serve)
        thread.start()
        settings = RankSettings(agent.endpoint, "job", 1, 0, 2, 0)
        try:
            shared = init.session(settings) if is_shared else None
            member = init.LocalMember(settings)
            with pytest.raises(CollectiveTimeout):
                member.form(1.0, 0.1)
            member.close(linger=False)
            assert init._session is shared
            if shared is not None:
                assert not shared._closing.is_set()
                assert list(shared.flights.unreached()) == []
        finally:
            init._close_session()
            done.set()
            thread.join()
