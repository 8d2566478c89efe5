"""The commands and their options. Errors that fleet raises on purpose become one sentence and a non-zero exit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from fleet import config
from fleet.cli.words import Words, split
from fleet.errors import ConfigError, FleetError, UsageError

USAGE = 2

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a model with more than one Python process, on one machine or many.",
)
SecretFile = Annotated[Path | None, typer.Option(help="File with the cluster secret.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="No secret: whoever reaches the port may run code.")]

_words: Words | None = None  # of this command line, split before typer sees it


@app.command("run")
def run_command(
    workers: Annotated[int | None, typer.Option(help="Number of ranks.", show_default="one per core")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to keep trying to reach the orchestrator.")] = 60.0,
    log_dir: Annotated[Path | None, typer.Option(help="Folder for rank-N.log files.")] = None,
    max_bundle: Annotated[int, typer.Option(help="Largest folder to send to a cluster, in MB.")] = 64,
    transport: Annotated[str, typer.Option(help="Between local ranks: tcp or ipc.")] = "tcp",
    orchestrator: Annotated[
        str | None, typer.Option(help="HOST:PORT; else ORCHESTRATOR_ADDR, else this machine.")
    ] = None,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """Run a job: fleet run SCRIPT [ARGS], fleet run -m MODULE [ARGS], or fleet run -- COMMAND [ARGS].

    fleet's options may stand anywhere before `--`; what fleet does not know is the script's, and so is all after `--`.
    """
    from fleet.cli.run import Options, bundle_limit, run_job

    assert _words is not None
    if transport not in ("tcp", "ipc"):
        raise UsageError(f"--transport is {transport!r}: it must be tcp or ipc")
    options = Options(
        workers=config.usable_cores() if workers is None else workers,
        timeout_s=timeout,
        log_dir=log_dir,
        max_bundle_bytes=bundle_limit(max_bundle),
        transport=cast(Literal["tcp", "ipc"], transport),
        orchestrator=orchestrator or config.orchestrator_address(),
        secret_file=secret_file,
        insecure=insecure,
    )
    raise typer.Exit(run_job(_words, options))


@app.command("orchestrator")
def orchestrator_command(
    bind: Annotated[str, typer.Option(help="HOST:PORT to listen on; 0.0.0.0 is every interface.")] = "127.0.0.1:50051",
    policy: Annotated[str, typer.Option(help="How ranks are spread: least-loaded or round-robin.")] = "least-loaded",
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """Run the orchestrator: workers and clients connect to it."""
    from fleet.cli.daemons import run_orchestrator
    from fleet.orchestrator.placement import POLICIES

    if policy not in POLICIES:
        raise UsageError(f"--policy is {policy!r}: it must be one of {', '.join(POLICIES)}")
    run_orchestrator(bind, policy, secret_file, insecure)


@app.command("worker")
def worker_command(
    slots: Annotated[int, typer.Option(help="Ranks that may run here at once.")] = 1,
    orchestrator: Annotated[str | None, typer.Option(help="HOST:PORT; else ORCHESTRATOR_ADDR.")] = None,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """Run a worker: its ranks listen on WORKER_PORT and the ports after it."""
    from fleet.cli.daemons import run_worker

    address = orchestrator or config.orchestrator_address() or config.DEFAULT_ORCHESTRATOR
    run_worker(address, slots, secret_file, insecure)


@app.command("why")
def why_command(
    job: Annotated[str, typer.Argument(help="The job's id.", show_default="the only one that runs")] = "",
    last: Annotated[int, typer.Option(help="Collectives to show of each rank.")] = 20,
    timeout: Annotated[float, typer.Option(help="Seconds to keep trying to reach the orchestrator.")] = 10.0,
    orchestrator: Annotated[
        str | None, typer.Option(help="HOST:PORT; else ORCHESTRATOR_ADDR, else this machine.")
    ] = None,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """Say what each rank of a running job is doing, and its last collectives."""
    from fleet.cli.why import explain

    address = orchestrator or config.orchestrator_address()
    typer.echo(explain(job, last, address, secret_file, insecure, timeout))


@app.command("version")
def version_command() -> None:
    """Print fleet's version."""
    typer.echo(config.VERSION)


def run() -> None:
    """Takes the command line of this process, and ends it with the right exit code."""
    global _words
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["run"]:
            _words = split(arguments[1:])
            arguments = ["run", *_words.options]
        app(arguments, prog_name="fleet")
    except (ConfigError, UsageError) as error:
        print(f"fleet: {error}", file=sys.stderr)
        sys.exit(USAGE)
    except FleetError as error:
        print(f"fleet: {error}", file=sys.stderr)
        sys.exit(1)
