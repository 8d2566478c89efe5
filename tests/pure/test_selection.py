"""Which files of a folder travel, and what is said of the others: keys, environments, .gitignore files above, whole machines."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from fleet import config
from fleet.bus.trees import remove_tree
from fleet.client.selection import KEYS, Selection, select
from fleet.errors import ConfigError


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return folder


def sent(selected: Selection) -> list[str]:
    return [path.relative_to(selected.folder).as_posix() for path in selected.size_of]


def stays(selected: Selection) -> dict[str, str]:
    return {path.relative_to(selected.folder).as_posix(): why for path, why in selected.left_out.items()}


def test_what_may_hold_keys_never_travels(tmp_path: Path) -> None:
    for pattern in KEYS:
        fill(tmp_path, f"{pattern.replace('*', 'x')}/inside", f"deep/{pattern.replace('*', 'Y').upper()}")
    fill(tmp_path, "train.py", "id_rsa.pub", ".env.example", "keys.py", "monkey.keys", ".envs", "config/a", "ssh/b")
    selected = select(tmp_path)
    assert sent(selected) == [
        ".env.example",
        ".envs",
        "config/a",
        "id_rsa.pub",
        "keys.py",
        "monkey.keys",
        "ssh/b",
        "train.py",
    ]
    assert len(selected.keys()) == 2 * len(KEYS)
    assert stays(selected)[".ssh"] == "may hold SSH keys"


@pytest.mark.parametrize("ignores", ["", "!.env\n!.ssh/\n"])
def test_no_rule_brings_keys_back(tmp_path: Path, ignores: str) -> None:
    fill(tmp_path, ".env", ".ssh/id_rsa", "train.py")
    (tmp_path / ".gitignore").write_text(ignores)
    assert sent(select(tmp_path)) == [".gitignore", "train.py"]


def test_home_and_what_is_above_it_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fill(tmp_path / "users" / "me", "train.py", "job/train.py")
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    for folder, why in (
        (home, "is your home folder"),
        (tmp_path / "link", "is your home folder"),
        (Path("/"), "whole machine"),
    ):
        with pytest.raises(ConfigError, match=f"{why}.*: put the script into a folder of its own"):
            select(folder)
    with pytest.raises(ConfigError, match="has your home folder in it"):
        select(home.parent)
    assert sent(select(home / "job")) == ["train.py"]


def test_a_user_without_a_home_may_send_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "home", lambda: None)
    assert sent(select(fill(tmp_path, "train.py"))) == ["train.py"]


def test_environments_are_known_by_what_is_in_them(tmp_path: Path) -> None:
    fill(
        tmp_path,
        "venv/model.py",
        ".venv/notes",
        "any/pyvenv.cfg",
        "any/lib/x.py",
        "conda/conda-meta/history",
        "conda/bin/x",
    )
    fill(tmp_path, "node_modules/data.csv", "web/package.json", "web/node_modules/left-pad/index.js")
    selected = select(tmp_path)
    assert sent(selected) == [".venv/notes", "node_modules/data.csv", "venv/model.py", "web/package.json"]
    assert stays(selected) == {
        "any": "a virtual environment",
        "conda": "a conda environment",
        "web/node_modules": "packages of Node.js",
    }


def test_gitignore_files_above_count_up_to_the_repositorys_root(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("train.py\n")  # above the root: not of this repository
    root = fill(
        tmp_path / "repo", ".git/HEAD", "a/b/train.py", "a/b/x.bin", "a/b/y.bin", "a/b/data/z", "a/b/deep/data/z"
    )
    (root / ".gitignore").write_text("*.bin\n/a/b/data\n")
    (root / "a" / ".gitignore").write_text("!y.bin\n")
    assert sent(select(root / "a" / "b")) == ["deep/data/z", "train.py", "y.bin"]
    (tmp_path / "alias").symlink_to(root / "a" / "b")
    assert sent(select(tmp_path / "alias")) == ["deep/data/z", "train.py", "y.bin"]
    # Who runs a script in a folder that is ignored as a whole wants it to travel.
    (root / ".gitignore").write_text("*.bin\n/a/b\n")
    assert sent(select(root / "a" / "b")) == ["data/z", "deep/data/z", "train.py", "x.bin", "y.bin"]


def test_without_a_repository_only_the_folders_own_rules_count(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*.py\n")
    fill(tmp_path / "job", "train.py")
    assert sent(select(tmp_path / "job")) == ["train.py"]


def test_the_script_itself_travels_whatever_is_ignored(tmp_path: Path) -> None:
    fill(tmp_path, "train.py", "other.py")
    (tmp_path / ".gitignore").write_text("*.py\n")
    assert sent(select(tmp_path, tmp_path / "train.py")) == [".gitignore", "train.py"]


def test_what_travels_and_what_does_not_is_said(tmp_path: Path) -> None:
    folder = fill(tmp_path / "job", "train.py", "lib/a.py")
    assert select(folder).summary() == f"sends {folder}: 2 files, 0.0 MB"
    fill(folder, "__pycache__/x", "b.pyc")
    assert select(folder).summary() == f"sends {folder}: 2 files, 0.0 MB; left out: 2 (--dry-run lists all)"
    fill(folder, ".env", ".netrc", "a.pem", "b.pem", "evil\n\x1b.key")
    assert (
        select(folder)
        .summary()
        .endswith("; left out: .env, .netrc, a.pem and 2 more (may hold keys), 2 others (--dry-run lists all)")
    )
    lines = select(folder).listed(64 << 20).splitlines()
    assert lines[:3] == [
        f"2 files, 0.0 MB of at most 64.0 MB, would travel from {folder}:",
        "  lib/a.py  1 bytes",
        "  train.py  1 bytes",
    ]
    assert "  .env  may hold passwords and tokens as variables" in lines
    assert r"  evil\n\x1b.key  may hold a private key" in lines


def test_special_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tempfile.gettempdir())
    assert stays(select(tmp_path)) == {"out": "a link that leads out of the folder"}


def test_everybodys_temporary_folder_stays_here(tmp_path: Path) -> None:
    fill(tmp_path, "train.py")
    tmp_path.chmod(0o1777)
    with pytest.raises(ConfigError, match="is everybody's folder for temporary files"):
        select(tmp_path)


def test_folders_that_lie_too_deep_get_a_sentence(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)
    with pytest.raises(ConfigError, match=r"too deep in each other in .* add the first of them to .gitignore"):
        select(tmp_path)
    (tmp_path / ".gitignore").write_text("d/\n")
    assert sent(select(tmp_path)) == [".gitignore"]
    remove_tree(tmp_path)
