"""The commands about jobs, and their options: submit, sweep, jobs, status, logs, cancel, wait, drain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleet import config
from fleet import messages as m
from fleet.cli.command_line import CommandLine
from fleet.cli.numbers import above_0, not_negative
from fleet.client.target import Target, cluster_target
from fleet.errors import UsageError
from fleet.text import shown_lines
from fleet.values import GRACE_AT_MOST_S, GRACE_S, PRIORITY_AT_MOST

job_commands = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
Timeout = Annotated[float, typer.Option(callback=above_0, help="Seconds to keep trying to reach the orchestrator.")]
Orchestrator = Annotated[str | None, typer.Option(help="HOST:PORT.", show_default="ORCHESTRATOR_ADDR")]
SecretFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the cluster secret.", show_default="FLEET_SECRET, FLEET_SECRET_FILE, ~/.config/fleet/secret"
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="No secret: whoever reaches the port may run code.")]
Job = Annotated[str, typer.Argument(help="The job's id, or how it begins.")]
SomeJobs = Annotated[
    list[str] | None, typer.Argument(help="Jobs by their ids, or how these begin.", show_default="those of --sweep")
]
Workers = Annotated[int, typer.Option(help="Number of ranks.")]
Priority = Annotated[int, typer.Option(help="Higher starts earlier; a minute of waiting counts as one.")]
Policy = Annotated[str, typer.Option(help="least-loaded or round-robin.", show_default="the cluster's")]
MaxRestarts = Annotated[
    int, typer.Option(help="How often it starts again after a worker was lost. A rank that fails is not run again.")
]
Slots = Annotated[int, typer.Option(help="Slots that each rank takes.")]
Gpus = Annotated[int, typer.Option(help="GPUs that each rank takes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list what would travel to the cluster, and what not.")]
MaxBundle = Annotated[int, typer.Option(help="Largest folder to send to a cluster, in MB.")]

WITH_SCRIPT = "[OPTIONS] SCRIPT [ARGS]..."  # in the line that says how a command is used
OutputFolder = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder for what the job writes.", show_default="./fleet-output/JOB"),
]
MaxOutput = Annotated[int, typer.Option(help="How much of that is brought from a cluster at most, in MB.")]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        help="On a cluster: files in the working folder that are output too, as in .gitignore; may be given again.",
        show_default="none",
    ),
]

command_lines: list[CommandLine] = []  # of this command line, split before typer sees it


def job_options(
    name: str,
    sweep: str,
    priority: int,
    policy: str,
    max_restarts: int,
    slots: int,
    gpus: int,
    grace_s: float = GRACE_S,
) -> m.JobOptions:
    """Raises UsageError for what no orchestrator would take."""
    if abs(priority) > PRIORITY_AT_MOST:
        raise UsageError(f"--priority is {priority}: it must be from -{PRIORITY_AT_MOST} to {PRIORITY_AT_MOST}")
    for option, value, least in (("--max-restarts", max_restarts, 0), ("--slots", slots, 1), ("--gpus", gpus, 0)):
        if not least <= value <= 1000:
            raise UsageError(f"{option} is {value}: it must be from {least} to 1000")
    if not 0 <= grace_s <= GRACE_AT_MOST_S:
        raise UsageError(f"--grace is {grace_s:g}: it must be a number of seconds from 0 to {GRACE_AT_MOST_S:g}")
    return m.JobOptions(name, sweep, priority, policy, max_restarts, slots, gpus, grace_s=grace_s)


def _cluster(orchestrator: str | None, secret_file: Path | None, insecure: bool, timeout: float) -> Target:
    address = orchestrator or config.orchestrator_address()
    if address is None:
        raise UsageError(
            "which cluster? set ORCHESTRATOR_ADDR or --orchestrator to HOST:PORT; `fleet run` needs none, and on one machine "
            "`fleet orchestrator` and `fleet worker` make one"
        )
    return cluster_target(address, secret_file, insecure, timeout)


@job_commands.command("submit", options_metavar=WITH_SCRIPT)
def submit_command(
    workers: Workers = 1,
    name: Annotated[str, typer.Option(help="For `fleet jobs`.", show_default="none")] = "",
    priority: Priority = 0,
    policy: Policy = "",
    max_restarts: MaxRestarts = 3,
    slots: Slots = 1,
    gpus: Gpus = 0,
    max_bundle: MaxBundle = 64,
    keep: Keep = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    timeout: Timeout = 60.0,
    orchestrator: Orchestrator = None,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """Submit a job that outlives this command, and print its id. In place of SCRIPT: -m MODULE, or -- COMMAND.

    Options after the script's name are the script's, but for --workers.
    """
    from fleet.cli.jobs import Submission, submit
    from fleet.cli.travel import bundle_limit, would_travel

    if dry_run:
        typer.echo(would_travel(command_lines[0], bundle_limit(max_bundle)))
        return
    options = job_options(name, "", priority, policy, max_restarts, slots, gpus)
    target = _cluster(orchestrator, secret_file, insecure, timeout)
    job_id = submit(target, command_lines[0], Submission(workers, options, bundle_limit(max_bundle), tuple(keep or ())))
    typer.echo(f'{{"job_id": "{job_id}"}}' if as_json else job_id)


@job_commands.command("sweep", options_metavar=WITH_SCRIPT)
def sweep_command(
    grid: Annotated[
        list[str] | None,
        typer.Option(help="NAME=A,B,C or NAME=FROM:TO; may be given again.", show_default="needed"),
    ] = None,
    workers: Workers = 1,
    name: Annotated[
        str,
        typer.Option(help="Of the sweep, for `fleet jobs --sweep` and `fleet cancel --sweep`.", show_default="made up"),
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the results.")] = False,
    priority: Priority = 0,
    policy: Policy = "",
    max_restarts: MaxRestarts = 3,
    slots: Slots = 1,
    gpus: Gpus = 0,
    max_bundle: MaxBundle = 64,
    keep: Keep = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    timeout: Timeout = 60.0,
    orchestrator: Orchestrator = None,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """Submit one job for each point of a grid, and show what came of them: fleet sweep --grid lr=0.1,0.01 SCRIPT.

    Options after the script's name are the script's, but for --workers.

    Each job gets its point as arguments (--lr 0.1). If the last line that it prints is a JSON object, that is its result.
    """
    from fleet.cli.jobs import Submission
    from fleet.cli.sweep import sweep
    from fleet.cli.travel import bundle_limit, would_travel
    from fleet.client.grid import points

    found = points(grid or [])
    if dry_run:
        typer.echo(would_travel(command_lines[0], bundle_limit(max_bundle)))
        return
    options = job_options("", name, priority, policy, max_restarts, slots, gpus)
    target = _cluster(orchestrator, secret_file, insecure, timeout)
    submission = Submission(workers, options, bundle_limit(max_bundle), tuple(keep or ()))
    raise typer.Exit(sweep(target, command_lines[0], submission, found, detach, as_json))


@job_commands.command("jobs")
def jobs_command(
    sweep: Annotated[
        str, typer.Option(help="The points and results of this sweep instead.", show_default="all jobs")
    ] = "",
    limit: Annotated[int, typer.Option(help="The newest so many.")] = 50,
    as_json: AsJson = False,
    timeout: Timeout = 10.0,
    orchestrator: Orchestrator = None,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """List jobs, the newest first. With --sweep: the table of a sweep, with what has come of it so far."""
    from fleet.cli.jobs import list_jobs
    from fleet.cli.sweep import again

    if limit < 1:
        raise UsageError(f"--limit is {limit}: it must be at least 1")
    target = _cluster(orchestrator, secret_file, insecure, timeout)
    typer.echo(again(target, sweep, as_json) if sweep else list_jobs(target, limit, as_json))


@job_commands.command("status")
def status_command(
    job: Job,
    as_json: AsJson = False,
    timeout: Timeout = 10.0,
    orchestrator: Orchestrator = None,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """Say all that is known of a job: its state, what it waits for, its attempts."""
    from fleet.cli.jobs import status

    typer.echo(status(_cluster(orchestrator, secret_file, insecure, timeout), job, as_json))


@job_commands.command("logs")
def logs_command(
    job: Job,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has ended.")] = False,
    rank: Annotated[int | None, typer.Option(help="Only this rank's.", show_default="all")] = None,
    timeout: Timeout = 10.0,
    orchestrator: Orchestrator = None,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """Show what a submitted job printed."""
    from fleet.cli.jobs import logs

    logs(_cluster(orchestrator, secret_file, insecure, timeout), job, rank, follow)


@job_commands.command("fetch")
def fetch_command(
    job: Job,
    patterns: Annotated[
        list[str] | None, typer.Argument(help="Only these files or folders, as in a shell.", show_default="all")
    ] = None,
    output: OutputFolder = None,
    max_output: MaxOutput = 1024,
    only_list: Annotated[bool, typer.Option("--list", help="Only show what there is.")] = False,
    as_json: AsJson = False,
    timeout: Timeout = 10.0,
    orchestrator: Orchestrator = None,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """Bring what a job wrote to FLEET_OUTPUT_DIR, from every worker that has a part of it. Overwrites nothing."""
    from fleet.cli.output import fetch, output_limit

    target = _cluster(orchestrator, secret_file, insecure, timeout)
    limit = output_limit(max_output)
    raise typer.Exit(fetch(target, job, patterns or (), output, limit, only_list, as_json))


@job_commands.command("cancel")
def cancel_command(
    jobs: SomeJobs = None,
    sweep: Annotated[str, typer.Option(help="All jobs of this sweep.", show_default="none")] = "",
    kill: Annotated[bool, typer.Option("--kill", help="At once, without a grace period.")] = False,
    as_json: AsJson = False,
    timeout: Timeout = 10.0,
    orchestrator: Orchestrator = None,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """Cancel jobs, whether they wait or run."""
    from fleet.cli.jobs import cancel, cancel_sweep

    if bool(jobs) == bool(sweep):
        raise UsageError("say what to cancel: fleet cancel JOB [JOB ...], or fleet cancel --sweep NAME")
    target = _cluster(orchestrator, secret_file, insecure, timeout)
    if sweep:
        typer.echo(cancel_sweep(target, sweep, kill, as_json))
    else:
        typer.echo(cancel(target, jobs or [], kill, as_json))


@job_commands.command("wait")
def wait_command(
    jobs: Annotated[list[str], typer.Argument(help="Jobs by their ids, or how these begin.")],
    as_json: AsJson = False,
    timeout: Timeout = 10.0,
    orchestrator: Orchestrator = None,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """Wait until jobs have ended; exit code 0 if all succeeded."""
    from fleet.cli.jobs import wait

    raise typer.Exit(wait(_cluster(orchestrator, secret_file, insecure, timeout), jobs, as_json))


@job_commands.command("drain")
def drain_command(
    worker: Annotated[str, typer.Argument(help="The worker's id, as `fleet workers` shows it.")],
    within: Annotated[
        float, typer.Option(callback=not_negative("seconds"), help="Seconds that what runs there has to end.")
    ] = float(config.DRAIN_S),
    undo: Annotated[bool, typer.Option("--undo", help="Give it work again.")] = False,
    as_json: AsJson = False,
    timeout: Timeout = 10.0,
    orchestrator: Orchestrator = None,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """Give a worker no new work; what does not end there in time starts again on others."""
    from fleet.cli.jobs import drain

    target = _cluster(orchestrator, secret_file, insecure, timeout)
    typer.echo(shown_lines(drain(target, worker, within, undo, as_json)))
