"""The `fleet` command and its commands, but for those about jobs. Errors become one sentence and an exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fleet import config
from fleet.cli import options as o
from fleet.cli.command_line import HELP, answer, check_command, parse
from fleet.cli.job_commands import job_commands
from fleet.errors import ConfigError, FleetError, UsageError
from fleet.text import shown_lines

USAGE = 2
_MISTAKE: Any = typer.BadParameter.__mro__[2]  # base of typer's errors for what it cannot parse
RUN_SOMETHING = ("run", "submit", "sweep")  # commands with a script's words behind their own

app = typer.Typer(
    cls=o.Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a model with more than one Python process, on one machine or many.",
)
app.add_typer(job_commands)


@app.callback()
def fleet_command(version: Annotated[bool, o.option("Print fleet's version.", "--version")] = False) -> None:
    """Train a model with more than one Python process, on one machine or many."""


@o.command(app, "run", o.WITH_SCRIPT)
def run_command(context: typer.Context, options: o.RunOptions) -> None:
    """Run a job and show what it prints. In place of SCRIPT: -m MODULE, or -- COMMAND.

    Options after the script's name are the script's. Only --workers may stand there too: fleet run train.py --lr 0.1 --workers 8.
    What comes after -- is the script's in any case.
    """
    from fleet.cli.run import run_job

    raise typer.Exit(run_job(context.obj, options))


@o.command(app, "orchestrator")
def orchestrator_command(
    *,
    bind: Annotated[str, o.option("HOST:PORT to listen on; 0.0.0.0 is every interface.")] = "127.0.0.1:50051",
    policy: Annotated[
        str, o.option("How ranks are spread: least-loaded or round-robin.", check=o.known_policy)
    ] = "least-loaded",
    state: Annotated[Path | None, o.option("Folder that keeps jobs.", default="FLEET_STATE_DIR, yours")] = None,
    keep_jobs: Annotated[int, o.option("Jobs that have ended, to keep at most.", check=o.not_negative)] = 10_000,
    keep_hours: Annotated[float, o.option("Hours to keep jobs that have ended.", check=o.time_in("hours"))] = 168.0,
    daemon: o.DaemonOptions,
) -> None:
    """Run the orchestrator: workers and clients connect to it."""
    from fleet.cli.daemons import run_orchestrator

    run_orchestrator(bind, policy, daemon, state, keep_jobs, keep_hours)


@o.command(app, "worker")
def worker_command(
    *,
    slots: Annotated[int, o.option("Ranks that may run here at once.")] = 1,
    gpus: Annotated[int, o.option("GPUs for jobs that ask for some.")] = 0,
    orchestrator: Annotated[
        str | None, o.option("HOST:PORT.", default=f"ORCHESTRATOR_ADDR, {config.DEFAULT_ORCHESTRATOR}")
    ] = None,
    within: Annotated[
        float | None,
        o.option(
            "Seconds that what runs here has to end, after SIGTERM.",
            check=o.time_in("seconds"),
            default=f"FLEET_DRAIN_S, {config.DRAIN_S}",
        ),
    ] = None,
    storage: Annotated[
        Path | None, o.option("Folder that keeps what jobs write.", default="FLEET_STORAGE_DIR, yours")
    ] = None,
    daemon: o.DaemonOptions,
) -> None:
    """Run a worker: its ranks listen on WORKER_PORT and the ports after it."""
    from fleet.cli.daemons import run_worker

    address = orchestrator or config.orchestrator_address() or config.DEFAULT_ORCHESTRATOR
    drain_s = config.drain_s() if within is None else within
    run_worker(address, slots, gpus, daemon, drain_s, storage)


@o.command(app, "workers")
def workers_command(as_json: o.AsJson = False, *, cluster: o.ClusterOptions) -> None:
    """List the workers of a cluster: state, slots, versions and jobs."""
    from fleet.cli.workers import list_workers

    typer.echo(list_workers(cluster.target(), as_json))


@o.command(app, "top")
def top_command(
    job: Annotated[
        str, typer.Argument(help="The job to open, by its id or how that begins.", show_default="none")
    ] = "",
    once: Annotated[
        bool, o.option("Print how it is now, and end; so it does where the output is no terminal.", "--once")
    ] = False,
    *,
    cluster: o.ClusterOptions,
) -> None:
    """Show the workers and jobs of a cluster as they change, as its page does. Press ? for the keys.

    A job of `fleet run` without a cluster is on this machine alone, and not here: `fleet run --dashboard` shows it.
    """
    if cluster.address is None:
        raise UsageError(
            "which cluster? set ORCHESTRATOR_ADDR or --orchestrator to HOST:PORT; a job of `fleet run` on this machine alone "
            "is in none: `fleet run --dashboard` shows it, and `fleet why` asks it"
        )
    from fleet.cli.top import top

    top(cluster.target(), job, once)


@o.command(app, "dashboard")
def dashboard_command(cluster: o.ClusterOptions) -> None:
    """Print the address of the cluster's page, with its token: whoever has that may see and cancel jobs."""
    from fleet.bus.address import parse as parse_address
    from fleet.cli.page import address_of

    target = cluster.target()
    host, _ = parse_address(cluster.address or "", config.ORCHESTRATOR_PORT, "ORCHESTRATOR_ADDR")
    address, *hints = address_of(target, host)
    typer.echo(address)
    for hint in hints:
        typer.echo(f"fleet: {hint}", err=True)


@o.command(app, "doctor")
def doctor_command(
    health: Annotated[bool, o.option("Only whether what runs here answers.", "--health")] = False,
    timeout: Annotated[float, o.option("Seconds to wait for each answer.", check=o.above_0)] = 3.0,
    secret_file: o.SecretFile = None,
    insecure: o.Insecure = False,
) -> None:
    """Check this machine, and whether the orchestrator and the workers on it answer over the bus."""
    if health:
        from fleet.cli.workers import health as healthy

        typer.echo(shown_lines("\n".join(healthy(secret_file, insecure, timeout))))
        return
    from fleet.cli.doctor import examine

    lines, well = examine(secret_file, insecure, timeout)
    typer.echo(shown_lines("\n".join(lines)))
    if not well:
        raise typer.Exit(1)


@o.command(app, "secret")
def secret_command(
    kept: Annotated[Path | None, o.option("File that keeps it; made if missing.", default="yours")] = None,
    owner_of: Annotated[Path | None, o.option("The kept file gets the owner of this file.", default="you")] = None,
    to: Annotated[Path | None, o.option("File to copy it to, for others to read.", default="none")] = None,
    reader: Annotated[int | None, o.option("User id that may read the copy.", default="you")] = None,
) -> None:
    """Make sure that there is a cluster secret, and say where. All machines of a cluster need the same one.

    With --to, a copy of it is handed to a container's user.
    """
    from fleet.cli.secret_setup import ensure

    typer.echo(ensure(kept, owner_of, to, reader))


@o.command(app, "why")
def why_command(
    job: Annotated[str, typer.Argument(help="The job's id.", show_default="the only one that runs")] = "",
    last: Annotated[
        int | None,
        o.option("Collectives to show of each rank.", check=o.not_negative, default="3; with --json 20"),
    ] = None,
    stacks: Annotated[bool, o.option("With the stacks of all threads of each rank.", "--stacks")] = False,
    as_json: o.AsJson = False,
    *,
    cluster: o.AnyClusterOptions,
) -> None:
    """Say what each rank of a running job is doing, and its last collectives."""
    from fleet.cli.why import explain

    typer.echo(explain(job, last, cluster.target() if cluster.address else None, as_json, stacks))


@app.command("version", hidden=True)
def version_command() -> None:
    """Print fleet's version, as --version does."""
    typer.echo(config.VERSION)


def _known(commands: Any, name: str) -> dict[str, bool]:
    """The options of a command, and whether each takes a value."""
    parameters = commands.commands[name].params
    return {HELP: False} | {option: not parameter.is_flag for parameter in parameters for option in parameter.opts}


def run() -> None:
    """Runs the command line of this process, and ends the process with the right exit code."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        arguments = ["version"]
    try:
        sys.exit(_carry_out(arguments))
    except FleetError as error:
        print(f"fleet: {shown_lines(str(error))}", file=sys.stderr)
        sys.exit(USAGE if isinstance(error, ConfigError | UsageError) else 1)


def _carry_out(arguments: list[str]) -> int:
    """The exit code of the command. One that runs something finds its command line, already cut, in its context."""
    commands: Any = typer.main.get_command(app)
    check_command(arguments, commands.commands)
    command = None
    if arguments and arguments[0] in RUN_SOMETHING:
        command = parse(arguments[1:], _known(commands, arguments[0]), arguments[0])
        arguments = [arguments[0], *command.options]
    try:
        return commands(arguments or ["--help"], prog_name="fleet", standalone_mode=False, obj=command) or 0
    except _MISTAKE as error:
        raise UsageError(answer(error.format_message(), arguments)) from None
