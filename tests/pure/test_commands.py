"""The commands' own help: how each is used, a default for every option, and one name for one thing."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fleet import config
from fleet.cli.app import RUN_SOMETHING, app
from fleet.client.rank_activity import as_values, described
from fleet.messages import Answer

COMMANDS: dict[str, Any] = {
    name: command
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    if not command.hidden
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_default_and_a_line_of_help(name: str) -> None:
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        is_flag = getattr(parameter, "is_flag", False)
        said = isinstance(parameter.show_default, str) or parameter.default not in (None, "")
        assert is_flag or parameter.required or said, f"fleet {name} {parameter.opts} does not say its default"


def test_one_thing_has_one_name() -> None:
    found = {option for command in COMMANDS.values() for parameter in command.params for option in parameter.opts}
    assert not found & {"--drain", "--group"}  # --within, and --sweep as the command is called
    json = [name for name, command in COMMANDS.items() if any("--json" in p.opts for p in command.params)]
    assert {"why", "workers", "jobs", "status", "submit", "sweep", "wait", "cancel", "drain"} <= set(json)


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_a_flag_has_no_type_in_the_help(words: list[str]) -> None:
    assert "<bool>" not in CliRunner().invoke(app, words, prog_name="fleet").output


@pytest.mark.parametrize("name", RUN_SOMETHING)
def test_the_line_of_use_has_the_script(name: str) -> None:
    printed = CliRunner().invoke(app, [name, "--help"], prog_name="fleet").output
    assert f"fleet {name} [OPTIONS] SCRIPT [ARGS]..." in printed


def test_the_version_is_an_option_as_everywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fleet.cli.app import run

    for words in (["--version"], ["version"]):
        monkeypatch.setattr("sys.argv", ["fleet", *words])
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"{config.VERSION}\n"


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("-h", "write fleet --help"),
        ("help", "write fleet --help"),
        ("help run", "write fleet run --help"),
        ("-V", "write fleet --version"),
        ("train.py --lr 1", "a command comes first, to run a script: fleet run train.py --lr 1"),
        ("--workers 2 train.py", "a command comes first, to run a script: fleet run --workers 2 train.py"),
        ("rum t.py", "there is no command rum (is it run?); fleet --help lists them, and fleet run runs a script"),
        ("run --workers x t.py", "--workers is 'x': it must be a whole number"),
        ("run t.py --workers=", "--workers is '': it must be a whole number"),
        ("run --grace x t.py", "--grace is 'x': it must be a number"),
        ("status -h", "write fleet status --help"),
        ("status", "say which job: fleet status JOB; `fleet jobs` lists them"),
        ("wait", "say which job: fleet wait JOB; `fleet jobs` lists them"),
        ("drain --within 3", "say which worker: fleet drain WORKER; `fleet workers` lists them"),
        ("--versoin", "fleet does not know --versoin: it is --version"),
        ("why --last -1", "--last is -1: it must not be negative"),
        ("doctor --json", "no such option: --json; fleet doctor --help says what may be given"),
        ("run --timeout nan t.py", "--timeout is nan: it must be a number of seconds above 0, up to 1e9"),
        ("jobs --timeout inf", "--timeout is inf: it must be a number of seconds above 0, up to 1e9"),
        ("why --timeout 0", "--timeout is 0: it must be a number of seconds above 0, up to 1e9"),
        ("doctor --timeout -1", "--timeout is -1: it must be a number of seconds above 0, up to 1e9"),
        ("drain w --within nan", "--within is nan: it must be a number of seconds from 0 to 1e9"),
        ("worker --within -1", "--within is -1: it must be a number of seconds from 0 to 1e9"),
        ("orchestrator --keep-hours inf", "--keep-hours is inf: it must be a number of hours from 0 to 1e9"),
        ("run --priority -1001 t.py", "--priority is -1001: it must be from -1000 to 1000"),
        ("submit --slots 0 t.py", "--slots is 0: it must be from 1 to 1000"),
        ("run --gpus -1 t.py", "--gpus is -1: it must be from 0 to 1000"),
        ("submit --max-restarts 1001 t.py", "--max-restarts is 1001: it must be from 0 to 1000"),
        ("run --grace -1 t.py", "--grace is -1: it must be a number of seconds from 0 to 604800"),
        ("jobs --limit 0", "--limit is 0: it must be at least 1"),
        ("fetch j --max-output -1", "--max-output is -1: it must be a number of megabytes, 0 for none"),
        ("orchestrator --keep-jobs -1", "--keep-jobs is -1: it must not be negative"),
        ("run --max-bundle 0 t.py", "--max-bundle is 0: it must be a number of megabytes above 0"),
        *(
            (
                f"{command} --policy spread t.py",
                "--policy is 'spread': it must be one of least-loaded, round-robin, by-name",
            )
            for command in ("run", "submit", "sweep --grid a=1", "orchestrator")
        ),
        ("worker --metrics-port 65536", "--metrics-port is 65536: it must be a port from 0 (any free one) to 65535"),
    ],
)
def test_mistakes_get_one_sentence(
    typed: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fleet.cli.app import run

    monkeypatch.setattr("sys.argv", ["fleet", *typed.split()])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"fleet: {sentence}\n"


def test_why_shows_as_many_collectives_as_it_is_told() -> None:
    answer = Answer("j", 1, 0, 0, 2, "h", 7, 5, True, "is at t.py:3", "", "t.py:3", "one\ntwo\nthree")
    for count, shown in ((0, []), (2, ["two", "three"]), (9, ["one", "two", "three"])):
        assert [line.strip() for line in described([answer], (), count).splitlines()[1:]] == shown
        assert as_values([answer], [], count)[0]["recent"] == shown
    one = Answer("j", 1, 0, 0, 2, "h", 7, 5, True, "is at t.py:3", "", "t.py:3", "communicator 0:\n  #1\n  #2")
    assert described([one], (), 3).splitlines()[1:] == ["    #1", "    #2"]
    two = Answer(
        "j", 1, 0, 0, 2, "h", 7, 5, True, "is at t.py:3", "", "t.py:3", "communicator 0:\n  #1\ncommunicator 1:\n  #1"
    )
    assert described([two], (), 2).splitlines()[1:] == ["    communicator 1:", "      #1"]


def test_why_begins_with_ranks_that_do_the_same() -> None:
    waits, late = "is in collective #5 barrier()", "is at t.py:3 in load"
    ranks = [Answer("j", 1, 0, 0, n, "h", n, 5, n != 1, late if n == 1 else waits, "", "t.py:3") for n in range(4)]
    assert described(ranks, (), 3).splitlines() == [
        f"ranks 0,2-3: each {waits}",
        f"rank 1 {late}",
        "",
        *(f"rank {n} (h, pid {n}) {late if n == 1 else waits}" for n in range(4)),
    ]
    assert described([], [1, 2, 5], 3) == "ranks 1-2,5 did not answer within 2 s: stopped, frozen or cut off"
    assert described(ranks[:2], (), 3).splitlines()[0] == f"rank 0 (h, pid 0) {waits}"


def test_why_as_values() -> None:
    answer = Answer("j", 1, 0, 0, 2, "h", 7, 5, True, "is in collective #5", "barrier()", "t.py:3", "one\ntwo\nthree")
    told, silent = as_values([answer], [3], 2)
    assert told["rank"] == 2
    assert told["recent"] == ["two", "three"]
    assert silent == {"rank": 3, "doing": "did not answer: stopped, frozen or cut off"}
