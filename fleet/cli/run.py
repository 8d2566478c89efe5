"""`fleet run`: checks its options, runs the job on this machine or on a cluster, and reports its end."""

from __future__ import annotations

import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO, cast

import msgspec

from fleet import config
from fleet import messages as m
from fleet.bus.address import parse
from fleet.cli.agents import local_fork_server
from fleet.cli.command_line import CommandLine
from fleet.cli.files import check_file
from fleet.cli.job_report import save_report
from fleet.cli.options import RunOptions
from fleet.cli.output import MB, LocalOutput, bring, check_folder, local_output
from fleet.cli.page import address_of
from fleet.cli.runtime import runtime_folder
from fleet.cli.script import hint_at_options, preload_for
from fleet.cli.stdin import Readers, readers, standard_input
from fleet.cli.submission import Submission, submission_of
from fleet.cli.trace import save_trace, take_traces
from fleet.client.attached_job import AttachedJob, say
from fleet.client.printer import Printer
from fleet.client.report import exit_code, report
from fleet.client.target import Target, cluster_target
from fleet.errors import UsageError
from fleet.worker.imports import Imports

if TYPE_CHECKING:
    from fleet.cli.embedded_cluster import Transport

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
BROKEN_PIPE = 128 + signal.SIGPIPE


@dataclass(frozen=True)
class _Place:
    """The cluster of a job, and the job in the form for that cluster."""

    target: Target
    spec: m.Spec
    bundle: Path | None
    options: m.JobOptions
    output: LocalOutput | None  # None: it stays on the workers until it is brought


def run_job(command: CommandLine, options: RunOptions) -> int:
    """Runs the job, and returns the exit code of the command. Raises ConfigError, UsageError before anything starts."""
    if options.transport not in ("tcp", "ipc"):
        raise UsageError(f"--transport is {options.transport!r}: it must be tcp or ipc")
    task = config.slurm_task()
    workers = options.workers
    if workers is None:
        workers = config.usable_cores() if task is None else task.task_count
    submission = submission_of(command, workers, options)
    check_file(options.trace, "the trace")
    check_file(options.report, "the report")
    imports, folder = submission.check(), _current_folder()
    orchestrator = options.orchestrator or config.orchestrator_address()  # None: embed one here
    who = readers(options.stdin, local=orchestrator is None and task is None)
    if options.dry_run:
        stays = (
            f"nothing would travel: the ranks run on this machine, in {folder} (set ORCHESTRATOR_ADDR for a cluster)"
        )
        print(submission.listed() if orchestrator else stays)
        return 0
    if task is not None and options.dashboard:
        raise UsageError("--dashboard is for this machine or a cluster with an orchestrator; a Slurm step has no page")
    if task is not None and submission.workers != task.task_count:
        raise UsageError(
            f"--workers is {submission.workers}, and srun started {task.task_count} tasks: each is one rank, so leave it out"
        )
    if task is not None and task.rank > 0:
        # Of a cluster that is there already, task 0 alone is the client.
        if orchestrator is not None:
            return 0
        from fleet.cli.slurm import serve

        return serve(task, _preload(imports), options.timeout, local_output(options.output).storage)
    if hint := hint_at_options(command):
        say(hint)
    try:
        printer = Printer(submission.workers, sys.stdout, sys.stderr, _coloured, options.log_dir)
    except OSError as error:
        raise UsageError(f"--log-dir {options.log_dir} cannot be used: {error.strerror}") from None
    with runtime_folder() as runtime, _interruptions() as interruption, ExitStack() as stack:
        if orchestrator is None:
            here = _on_this_machine(submission, options, runtime, _preload(imports), who, interruption)
            place = stack.enter_context(here)
        else:
            place = _on_cluster(orchestrator, submission, options, runtime)
        return _run(place, submission.workers, printer, interruption, options)


def _run(place: _Place, workers: int, printer: Printer, interruption: _Interruption, options: RunOptions) -> int:
    """Runs the job there, reports its end, and brings its output. Returns the exit code of the command."""
    submit = m.Submit(uuid.uuid4().hex[:12], workers, place.spec, options=place.options)
    job = AttachedJob(place.target, submit, place.bundle, printer)
    if place.output is not None:
        place.output.job_id = job.job_id
    interruption.attach(job)
    try:
        ended = job.run()
    except BrokenPipeError:
        return BROKEN_PIPE  # the reader of our output has gone; leaving ends the job
    cancelled_by = interruption.number if job.cancelled else 0
    try:
        with interruption.raised():
            if options.traces:
                traces = take_traces(place.target, job.job_id, place.output)
            if options.trace is not None:
                save_trace(options.trace, traces)
            if options.report is not None:
                save_report(place.target, job.job_id, options.report, ended, traces)
    except KeyboardInterrupt:
        say("interrupted: the trace and the report of this job are not complete")
    if place.output is not None:
        place.output.say()
    if cancelled_by:
        if place.output is None and job.ever_started:
            say(f"what it wrote to FLEET_OUTPUT_DIR stays on its workers: `fleet fetch {job.job_id}` brings it")
        return 128 + cancelled_by
    if text := report(ended, workers, printer.recent):
        print(text, file=sys.stderr, flush=True)
    elif ended.straggler is not None:
        say(str(ended.straggler))
    try:
        with interruption.raised():
            came = place.output is not None or bring(place.target, job.job_id, options.output, options.max_output * MB)
    except KeyboardInterrupt:
        return 128 + interruption.number
    return exit_code(ended) or (0 if came else 1)


@contextmanager
def _on_this_machine(
    submission: Submission,
    options: RunOptions,
    runtime: Path,
    preload: tuple[str, ...],
    who: Readers,
    interruption: _Interruption,
) -> Iterator[_Place]:
    """The embedded local cluster, or the tasks of a Slurm step."""
    task = config.slurm_task()
    job = _job_here(submission, task is not None)
    output = local_output(options.output)
    with ExitStack() as stack:
        stack.callback(output.drop_empty)  # once all ranks have ended
        if task is None:
            gpus = submission.workers * job.gpus
            stdin = stack.enter_context(standard_input(who, submission.workers))
            zygote = stack.enter_context(local_fork_server(submission.workers, preload))
            from fleet.cli.embedded_cluster import embedded_cluster  # beside the imports of the fork server

            cluster = embedded_cluster(
                runtime,
                submission.workers,
                cast("Transport", options.transport),
                zygote,
                output.storage,
                gpus,
                stdin,
                _say_page if options.dashboard else None,
            )
        else:
            from fleet.cli.slurm import step_cluster

            cluster = step_cluster(
                task, runtime, preload, options.timeout, lambda: interruption.early_count > 0, output.storage
            )
        target = stack.enter_context(cluster)
        spec = submission.spec(submission.command.target, _current_folder())
        yield _Place(target, spec, None, job, output)


def _on_cluster(orchestrator: str, submission: Submission, options: RunOptions, runtime: Path) -> _Place:
    check_folder(options.output)
    target = cluster_target(orchestrator, options.secret_file, options.insecure, options.timeout)
    if options.dashboard:
        host, _ = parse(orchestrator, config.ORCHESTRATOR_PORT, "ORCHESTRATOR_ADDR")
        _say_page("; ".join(address_of(target, host)))
    return _Place(target, *submission.bundled(runtime), submission.options, None)


def _say_page(address: str) -> None:
    say(f"the page is at {address}")


def _current_folder() -> str:
    try:
        return str(Path.cwd())
    except OSError as error:
        raise UsageError(f"the current folder cannot be used ({error.strerror}): change to another one") from None


def _preload(imports: Imports) -> tuple[str, ...]:
    wanted = config.preload()
    return preload_for(imports) if wanted is None else wanted


def _job_here(submission: Submission, is_slurm_task: bool) -> m.JobOptions:
    """The options of a job without a cluster. Raises UsageError where it would wait for ever."""
    workers, gpus, found = submission.workers, submission.options.gpus, config.gpu_count()
    if gpus and is_slurm_task:
        raise UsageError("--gpus is for workers of a cluster; under srun, say it to srun: --gpus-per-task")
    if workers * gpus > found:
        raise UsageError(
            f"--workers {workers} with --gpus {gpus} takes {workers * gpus} of them, and this machine has "
            f"{found or 'none'} (CUDA_VISIBLE_DEVICES, /dev/nvidia*); ORCHESTRATOR_ADDR says which cluster has some"
        )
    # There is nothing else here that a rank would share slots with.
    return msgspec.structs.replace(submission.options, slots=1)


@dataclass
class _Interruption:
    """The signal that has come, and the job that it ends."""

    job: AttachedJob | None = None
    number: int = signal.SIGINT
    early_count: int = 0  # before there was a job
    is_raised: bool = False  # the job has ended, and there is none to stop

    def attach(self, job: AttachedJob) -> None:
        """From here on signals end this job. So do those that came before."""
        self.job = job
        for _ in range(self.early_count):
            job.cancel(self.number)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Each signal is a KeyboardInterrupt meanwhile."""
        self.is_raised = True
        try:
            yield
        finally:
            self.is_raised = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self.is_raised:
            self.is_raised = False
            raise KeyboardInterrupt
        for _ in range(2 if number == signal.SIGQUIT else 1):  # Ctrl-\: at once
            if self.job is None:
                self.early_count += 1
            else:
                self.job.cancel(number)


@contextmanager
def _interruptions() -> Iterator[_Interruption]:
    """Makes Ctrl-C, SIGTERM and a closed terminal end the job instead of this process.

    Signals that the starter ignores stay ignored: SIGHUP under nohup, SIGINT and SIGQUIT in the background of a shell script.
    """
    interruption = _Interruption()
    heard = [number for number in INTERRUPTIONS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interruption) for number in heard}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _coloured(stream: TextIO) -> bool:
    return stream.isatty() and not config.is_set("NO_COLOR")  # no-color.org
