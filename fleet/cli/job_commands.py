"""The commands about jobs: submit, sweep, jobs, status, logs, fetch, cancel, wait, drain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleet import config
from fleet.cli import options as o
from fleet.errors import UsageError
from fleet.text import shown_lines

job_commands = typer.Typer()


@o.command(job_commands, "submit", o.WITH_SCRIPT)
def submit_command(
    context: typer.Context,
    workers: o.Workers = 1,
    name: Annotated[str, o.option("For `fleet jobs`.", default="none")] = "",
    *,
    options: o.SubmitOptions,
) -> None:
    """Submit a job that outlives this command, and print its id. In place of SCRIPT: -m MODULE, or -- COMMAND.

    Options after the script's name are the script's, but for --workers.
    """
    from fleet.cli.jobs import submit
    from fleet.cli.submission import submission_of

    submission = submission_of(context.obj, workers, options, name=name)
    if options.dry_run:
        typer.echo(submission.listed())
        return
    job_id = submit(options.cluster.target(), submission)
    typer.echo(f'{{"job_id": "{job_id}"}}' if options.as_json else job_id)


@o.command(job_commands, "sweep", o.WITH_SCRIPT)
def sweep_command(
    context: typer.Context,
    grid: Annotated[
        list[str] | None, o.option("NAME=A,B,C or NAME=FROM:TO; may be given again.", default="needed")
    ] = None,
    workers: o.Workers = 1,
    name: Annotated[
        str, o.option("Of the sweep, for `fleet jobs --sweep` and `fleet cancel --sweep`.", default="made up")
    ] = "",
    detach: Annotated[bool, o.option("Do not wait for the results.", "--detach")] = False,
    *,
    options: o.SubmitOptions,
) -> None:
    """Submit one job for each point of a grid, and show what came of them: fleet sweep --grid lr=0.1,0.01 SCRIPT.

    Options after the script's name are the script's, but for --workers.

    Each job gets its point as arguments (--lr 0.1). If the last line that it prints is a JSON object, that is its result.
    """
    from fleet.cli.submission import submission_of
    from fleet.cli.sweep import sweep
    from fleet.client.grid import points

    found = points(grid or [])
    submission = submission_of(context.obj, workers, options, sweep=name)
    if options.dry_run:
        typer.echo(submission.listed())
        return
    raise typer.Exit(sweep(options.cluster.target(), submission, found, detach, options.as_json))


@o.command(job_commands, "jobs")
def jobs_command(
    sweep: Annotated[str, o.option("The points and results of this sweep instead.", default="all jobs")] = "",
    limit: Annotated[int, o.option("The newest so many.", check=o.at_least_1)] = 50,
    watch: Annotated[bool, o.option("Go on with what changes, until Ctrl-C.", "--watch", "-w")] = False,
    as_json: o.AsJson = False,
    *,
    cluster: o.ClusterOptions,
) -> None:
    """List jobs, the newest first. With --sweep: the table of a sweep, with what has come of it so far.

    With --watch in a terminal, the list is drawn anew as it changes; elsewhere each change is a line, with --json an object.
    """
    from fleet.cli.jobs import list_jobs
    from fleet.cli.sweep import again

    target = cluster.target()
    if watch:
        from fleet.cli.watch import watch as go_on

        go_on(target, sweep, limit, as_json)
    typer.echo(again(target, sweep, as_json) if sweep else list_jobs(target, limit, as_json))


@o.command(job_commands, "status")
def status_command(job: o.Job, as_json: o.AsJson = False, *, cluster: o.ClusterOptions) -> None:
    """Say all that is known of a job: its state, what it waits for, its attempts."""
    from fleet.cli.jobs import status

    typer.echo(status(cluster.target(), job, as_json))


@o.command(job_commands, "logs")
def logs_command(
    job: o.Job,
    follow: Annotated[bool, o.option("Until the job has ended.", "--follow", "-f")] = False,
    rank: Annotated[int | None, o.option("Only this rank's.", default="all")] = None,
    *,
    cluster: o.ClusterOptions,
) -> None:
    """Show what a submitted job printed."""
    from fleet.cli.jobs import logs

    logs(cluster.target(), job, rank, follow)


@o.command(job_commands, "trace")
def trace_command(
    job: o.JobOrTheOnly = "",
    output: Annotated[Path, o.option("File to write.", "--output", "-o")] = Path("trace.json"),
    seconds: Annotated[
        float | None, o.option("Only the last so many.", check=o.above_0, default="all that ranks have kept")
    ] = None,
    merge: Annotated[
        list[Path] | None, o.option("A rank's trace of torch.profiler, to go in; may be given again.", default="none")
    ] = None,
    *,
    cluster: o.AnyClusterOptions,
) -> None:
    """Write what each rank of a job did, for chrome://tracing and Perfetto.

    Of a job that has ended, if it was submitted with --trace.
    """
    from fleet.cli.trace import trace

    trace(job, cluster.target() if cluster.address else None, output, seconds, merge or ())


@o.command(job_commands, "report")
def report_command(
    job: o.JobOrTheOnly = "",
    output: Annotated[Path, o.option("HTML file to write.", "--output", "-o")] = Path("report.html"),
    *,
    cluster: o.AnyClusterOptions,
) -> None:
    """Write a report of a job as one HTML file: what ran, where, how long, what held it up, why it failed.

    Of a job that has ended with pictures, if it was submitted with --trace.
    """
    from fleet.cli.job_report import write_report

    write_report(job, cluster.target() if cluster.address else None, output)


@o.command(job_commands, "fetch")
def fetch_command(
    job: o.Job,
    patterns: Annotated[
        list[str] | None, typer.Argument(help="Only these files or folders, as in a shell.", show_default="all")
    ] = None,
    output: o.OutputFolder = None,
    max_output: o.MaxOutput = 1024,
    only_list: Annotated[bool, o.option("Only show what there is.", "--list")] = False,
    as_json: o.AsJson = False,
    *,
    cluster: o.ClusterOptions,
) -> None:
    """Bring what a job wrote to FLEET_OUTPUT_DIR, from every worker that has a part of it. Overwrites nothing."""
    from fleet.cli.output import MB, fetch

    raise typer.Exit(fetch(cluster.target(), job, patterns or (), output, max_output * MB, only_list, as_json))


@o.command(job_commands, "cancel")
def cancel_command(
    jobs: Annotated[
        list[str] | None, typer.Argument(help="Jobs by their ids, or how these begin.", show_default="those of --sweep")
    ] = None,
    sweep: Annotated[str, o.option("All jobs of this sweep.", default="none")] = "",
    kill: Annotated[bool, o.option("At once, without a grace period.", "--kill")] = False,
    as_json: o.AsJson = False,
    *,
    cluster: o.ClusterOptions,
) -> None:
    """Cancel jobs, whether they wait or run."""
    from fleet.cli.jobs import cancel, cancel_sweep

    if bool(jobs) == bool(sweep):
        raise UsageError("say what to cancel: fleet cancel JOB [JOB ...], or fleet cancel --sweep NAME")
    target = cluster.target()
    typer.echo(cancel_sweep(target, sweep, kill, as_json) if sweep else cancel(target, jobs or [], kill, as_json))


@o.command(job_commands, "wait")
def wait_command(
    jobs: Annotated[list[str], typer.Argument(help="Jobs by their ids, or how these begin.")],
    as_json: o.AsJson = False,
    *,
    cluster: o.ClusterOptions,
) -> None:
    """Wait until jobs have ended; exit code 0 if all succeeded."""
    from fleet.cli.jobs import wait

    raise typer.Exit(wait(cluster.target(), jobs, as_json))


@o.command(job_commands, "drain")
def drain_command(
    worker: Annotated[str, typer.Argument(help="The worker's id, as `fleet workers` shows it.")],
    within: Annotated[float, o.option("Seconds that what runs there has to end.", check=o.time_in("seconds"))] = float(
        config.DRAIN_S
    ),
    undo: Annotated[bool, o.option("Give it work again.", "--undo")] = False,
    as_json: o.AsJson = False,
    *,
    cluster: o.ClusterOptions,
) -> None:
    """Give a worker no new work; what does not end there in time starts again on others."""
    from fleet.cli.jobs import drain

    typer.echo(shown_lines(drain(cluster.target(), worker, within, undo, as_json)))
