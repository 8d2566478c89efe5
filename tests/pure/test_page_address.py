"""Where `fleet dashboard` says that the page is, by what the orchestrator serves and how a client reaches it."""

from __future__ import annotations

import pytest

from fleet.cli.page import places


@pytest.mark.parametrize(
    ("page_at", "host", "said"),
    [
        ("0.0.0.0:9464", "orch.internal", "http://orch.internal:9464/?token=t"),
        ("[::]:9464", "fd00::1", "http://[fd00::1]:9464/?token=t"),
        ("proxy.example:8443", "orch.internal", "http://proxy.example:8443/?token=t"),  # FLEET_PAGE_AT
        ("127.0.0.1:50080", "127.0.0.1", "http://127.0.0.1:50080/?token=t"),
        ("127.0.0.1:50080", "orch.internal", "http://127.0.0.1:50080/?token=t"),  # through ssh, as the next line says
    ],
)
def test_places(page_at: str, host: str, said: str) -> None:
    assert places(page_at, host, "t")[0] == said
