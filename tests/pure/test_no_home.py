"""A user without a home folder, as in a container that runs under any number: a sentence, or another place."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet import config
from fleet.errors import ConfigError


def test_what_is_kept_in_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "FLEET_STATE_DIR", "FLEET_STORAGE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    assert config.storage_folder() is None
    with pytest.raises(ConfigError, match="no home folder to keep jobs in"):
        config.state_folder(50051)
    monkeypatch.setenv("FLEET_STORAGE_DIR", "/somewhere")
    assert config.storage_folder() == Path("/somewhere")
