"""`fleet run`: checks what can be checked, then runs the job on this machine or on a cluster. Puts the parts together."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

import msgspec

from fleet import config
from fleet import messages as m
from fleet.bounds import RANKS_AT_MOST
from fleet.cli.command_line import CommandLine
from fleet.cli.embedded_cluster import Transport, embedded_cluster
from fleet.cli.output import LocalOutput, bring, check_folder, local_output
from fleet.cli.runtime import runtime_folder
from fleet.cli.script import check_target, preload_for
from fleet.cli.slurm import serve, step_cluster
from fleet.cli.stdin import readers, standard_input
from fleet.client.attached_job import AttachedJob, say
from fleet.client.printer import Printer
from fleet.client.report import INTERRUPTED, exit_code, report
from fleet.client.target import cluster_target
from fleet.errors import UsageError
from fleet.values import portable
from fleet.worker.imports import Imports

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
BROKEN_PIPE = 128 + signal.SIGPIPE


@dataclass(frozen=True)
class Options:
    """fleet's own options of `fleet run`."""

    workers: int
    timeout_s: float
    log_dir: Path | None
    max_bundle_bytes: int
    transport: Transport
    orchestrator: str | None  # None: the embedded local cluster
    secret_file: Path | None
    insecure: bool
    job: m.JobOptions
    output: Path | None  # None: ./fleet-output/JOB
    max_output_bytes: int
    keep: tuple[str, ...]
    dry_run: bool = False
    stdin: str | None = None  # see readers


def run_job(command: CommandLine, options: Options) -> int:
    """Runs the job, and returns the exit code of the command. Raises ConfigError, UsageError before anything starts."""
    if not 1 <= options.workers <= RANKS_AT_MOST:
        raise UsageError(f"--workers is {options.workers}: a job needs from 1 to {RANKS_AT_MOST} ranks")
    here = _here()
    who = readers(options.stdin, local=options.orchestrator is None and config.slurm_task() is None)
    imports = check_target(command)
    if options.dry_run:
        from fleet.cli.travel import stays, would_travel

        print(would_travel(command, options.max_bundle_bytes) if options.orchestrator else stays())
        return 0
    task = config.slurm_task()
    if task is not None:
        if options.workers != task.task_count:
            raise UsageError(
                f"--workers is {options.workers}, and srun started {task.task_count} tasks: each is one rank, so leave it out"
            )
        if task.rank > 0:
            # Of a cluster that is there already, task 0 alone is the client.
            if options.orchestrator is not None:
                return 0
            return serve(task, _preload(imports), options.timeout_s, local_output(options.output).storage)
    try:
        printer = Printer(options.workers, sys.stdout, sys.stderr, _coloured, options.log_dir)
    except OSError as error:
        raise UsageError(f"--log-dir {options.log_dir} cannot be used: {error.strerror}") from None
    with ExitStack() as stack:
        runtime = stack.enter_context(runtime_folder())
        interruption = stack.enter_context(_interruptions())
        local: LocalOutput | None = None
        job = options.job
        if options.orchestrator is None:
            job = _job_here(options, task is not None)
            local = local_output(options.output)
            storage = local.storage
            stack.callback(local.drop_empty)  # once all ranks have ended
            if task is None:
                gpus = options.workers * job.gpus
                stdin = stack.enter_context(standard_input(who, options.workers))
                cluster = embedded_cluster(
                    runtime, options.workers, options.transport, _preload(imports), storage, gpus, stdin
                )
            else:
                cluster = step_cluster(
                    task, runtime, _preload(imports), options.timeout_s, lambda: interruption.early_count > 0, storage
                )
            target = stack.enter_context(cluster)
            args = tuple(map(portable, command.args))
            spec, bundle = m.Spec(command.kind, portable(command.target), args, portable(here)), None
        else:
            check_folder(options.output)
            target = cluster_target(options.orchestrator, options.secret_file, options.insecure, options.timeout_s)
            from fleet.cli.travel import spec_of_bundle  # here, for what it imports takes 10 ms

            spec, bundle = spec_of_bundle(command, runtime, options.max_bundle_bytes, options.keep)
        run = AttachedJob(target, spec, options.workers, job, bundle, printer)
        if local is not None:
            local.job_id = run.job_id
        interruption.run = run
        for _ in range(interruption.early_count):
            run.cancel(interruption.number)
        try:
            ended = run.run()
        except BrokenPipeError:
            return BROKEN_PIPE  # whoever read our output has gone; leaving ends the job
        if local is not None:
            local.say()
        if run.cancelled:
            if local is None:
                say(f"what it wrote to FLEET_OUTPUT_DIR stays on its workers: `fleet fetch {run.job_id}` brings it")
            return INTERRUPTED if interruption.number == signal.SIGINT else 128 + interruption.number
        text = report(ended, options.workers, printer.recent)
        if text:
            print(text, file=sys.stderr, flush=True)
        try:
            with interruption.raised():
                came = local is not None or bring(target, run.job_id, options.output, options.max_output_bytes)
        except KeyboardInterrupt:
            return 128 + interruption.number
        return exit_code(ended) or (0 if came else 1)


def _here() -> str:
    try:
        return str(Path.cwd())
    except OSError as error:
        raise UsageError(f"the current folder cannot be used ({error.strerror}): change to another one") from None


def _preload(imports: Imports) -> tuple[str, ...]:
    wanted = config.preload()
    return preload_for(imports) if wanted is None else wanted


def _job_here(options: Options, is_slurm_task: bool) -> m.JobOptions:
    """What a job without a cluster asks for. Raises UsageError where it would wait for ever."""
    gpus, found = options.job.gpus, config.gpu_count()
    if gpus and is_slurm_task:
        raise UsageError("--gpus is for workers of a cluster; under srun, say it to srun: --gpus-per-task")
    if options.workers * gpus > found:
        raise UsageError(
            f"--workers {options.workers} with --gpus {gpus} takes {options.workers * gpus} of them, and this machine has "
            f"{found or 'none'} (CUDA_VISIBLE_DEVICES, /dev/nvidia*); ORCHESTRATOR_ADDR says which cluster has some"
        )
    return msgspec.structs.replace(options.job, slots=1)  # there is nothing else here that a rank would share them with


@dataclass
class _Interruption:
    """Which signal came, and the run that it ends."""

    run: AttachedJob | None = None
    number: int = signal.SIGINT
    early_count: int = 0  # before there was a run
    is_raised: bool = False  # the run has ended, and there is no job to stop

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Each of them is a KeyboardInterrupt meanwhile."""
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
            if self.run is None:
                self.early_count += 1
            else:
                self.run.cancel(number)


@contextmanager
def _interruptions() -> Iterator[_Interruption]:
    """From here on Ctrl-C, SIGTERM and a closed terminal end the job instead of this process.

    What the starter ignores stays ignored: SIGHUP under nohup, SIGINT and SIGQUIT in the background of a shell script.
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
    return stream.isatty() and not config.no_colour()
