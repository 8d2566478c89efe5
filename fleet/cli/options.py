"""Options of the commands: the type, the default, the help and the check of each, declared once.

Options that belong together are a group: a dataclass of options that a command, or another group, takes as one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from fleet import config
from fleet.client.target import Target, cluster_target
from fleet.errors import UsageError
from fleet.values import GRACE_AT_MOST_S, GRACE_S, PRIORITY_AT_MOST, JobOptions

SECONDS_AT_MOST = 1e9  # thirty years; polls count in milliseconds
WITH_SCRIPT = "[OPTIONS] SCRIPT [ARGS]..."  # in the line that says how a command is used


# Checks, each made as soon as its option is parsed

Check = Callable[[typer.CallbackParam, Any], Any]


def number(low: float, high: float, meaning: str) -> Check:
    """A check that a number is from `low` to `high`, which nan is not. The error says that the option must `meaning`."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not low <= value <= high:
            shown = f"{value:g}" if isinstance(value, float) else value
            raise UsageError(f"{param.opts[0]} is {shown}: it must {meaning}")
        return value

    return check


def from_to(low: int, high: int) -> Check:
    return number(low, high, f"be from {low} to {high}")


def time_in(unit: str) -> Check:
    return number(0, SECONDS_AT_MOST, f"be a number of {unit} from 0 to 1e9")


above_0 = number(5e-324, SECONDS_AT_MOST, "be a number of seconds above 0, up to 1e9")  # from the least float
bundle_mb = number(1, 1 << 40, "be a number of megabytes above 0")
output_mb = number(0, 1 << 40, "be a number of megabytes, 0 for none")
at_least_1 = number(1, 1 << 40, "be at least 1")
not_negative = number(0, 1 << 40, "not be negative")
port = number(0, 65535, "be a port from 0 (any free one) to 65535")


def known_policy(param: typer.CallbackParam, value: str) -> str:
    """A scheduling policy. Raises UsageError where there is none of that name."""
    if value != param.default:
        from fleet.orchestrator.placement import POLICIES

        if value not in POLICIES:
            raise UsageError(f"{param.opts[0]} is {value!r}: it must be one of {', '.join(POLICIES)}")
    return value


def known_backend(param: typer.CallbackParam, value: str | None) -> str | None:
    """The backend of torch.distributed that fleet has. Raises UsageError for another name."""
    if value not in (None, "fleet"):
        raise UsageError(f"{param.opts[0]} is {value!r}: it must be fleet; without it scripts get what they ask for")
    return value


def option(help: str, *names: str, check: Check | None = None, default: str | bool = True) -> Any:
    """An option, by default `--` and its parameter's name. `default` says what is taken without it, where its value does not."""
    return typer.Option(*names, callback=check, help=help, show_default=default)


# Options of several commands

AsJson = Annotated[bool, option("As JSON.", "--json")]
Timeout = Annotated[float, option("Seconds to keep trying to reach the orchestrator.", check=above_0)]
Orchestrator = Annotated[str | None, option("HOST:PORT.", default="ORCHESTRATOR_ADDR")]
OrThisMachine = Annotated[str | None, option("HOST:PORT.", default="ORCHESTRATOR_ADDR, this machine")]
SecretFile = Annotated[
    Path | None,
    option("File with the cluster secret.", default="FLEET_SECRET, FLEET_SECRET_FILE, ~/.config/fleet/secret"),
]
Insecure = Annotated[bool, option("No secret: whoever reaches the port may run code.", "--insecure")]
Job = Annotated[str, typer.Argument(help="The job's id, or how it begins.")]
JobOrTheOnly = Annotated[
    str, typer.Argument(help="The job's id, or how it begins.", show_default="the only one that runs")
]
Workers = Annotated[int, option("Number of ranks.")]
DryRun = Annotated[bool, option("Only list what would travel to the cluster, and what not.", "--dry-run")]
MaxBundle = Annotated[int, option("Largest folder to send to a cluster, in MB.", check=bundle_mb)]
OutputFolder = Annotated[
    Path | None, option("Folder for what the job writes.", "--output", "-o", default="./fleet-output/JOB")
]
MaxOutput = Annotated[int, option("How much of that is brought from a cluster at most, in MB.", check=output_mb)]
Keep = Annotated[
    list[str] | None,
    option(
        "On a cluster: files in the working folder that are output too, as in .gitignore; may be given again.",
        default="none",
    ),
]
TraceFile = Annotated[
    Path | None, option("File for a trace of what each rank does, for chrome://tracing and Perfetto.", default="none")
]
TorchBackend = Annotated[
    str | None,
    option(
        "fleet: torch scripts that ask for gloo, or for nothing, get fleet on CPU.",
        check=known_backend,
        default="FLEET_TORCH_BACKEND, what they ask for",
    ),
]


# Groups


@dataclass(frozen=True)
class ClusterOptions:
    """Options of a command that talks to the orchestrator of a cluster."""

    timeout: Timeout = 10.0
    orchestrator: Orchestrator = None
    secret_file: SecretFile = None
    insecure: Insecure = False

    @property
    def address(self) -> str | None:
        return self.orchestrator or config.orchestrator_address()

    def target(self) -> Target:
        """Raises UsageError where no cluster is named, ConfigError where it has no secret."""
        if self.address is None:
            raise UsageError(
                "which cluster? set ORCHESTRATOR_ADDR or --orchestrator to HOST:PORT; `fleet run` needs none, and on one machine "
                "`fleet orchestrator` and `fleet worker` make one"
            )
        return cluster_target(self.address, self.secret_file, self.insecure, self.timeout)


@dataclass(frozen=True)
class AnyClusterOptions(ClusterOptions):
    """Those of a command that does without a cluster too."""

    orchestrator: OrThisMachine = None


@dataclass(frozen=True)
class PatientClusterOptions(ClusterOptions):
    """Those of a command that submits."""

    timeout: Timeout = 60.0


@dataclass(frozen=True)
class SchedulingOptions:
    """Options about how a job is scheduled."""

    priority: Annotated[
        int,
        option(
            "Higher starts earlier; a minute of waiting counts as one.",
            check=from_to(-PRIORITY_AT_MOST, PRIORITY_AT_MOST),
        ),
    ] = 0
    policy: Annotated[str, option("least-loaded or round-robin.", check=known_policy, default="the cluster's")] = ""
    max_restarts: Annotated[
        int,
        option(
            "How often it starts again after a worker was lost. A rank that fails is not run again.",
            check=from_to(0, 1000),
        ),
    ] = 3
    slots: Annotated[int, option("Slots that each rank takes.", check=from_to(1, 1000))] = 1
    gpus: Annotated[int, option("GPUs that each rank takes.", check=from_to(0, 1000))] = 0

    def job_options(self, name: str = "", sweep: str = "", grace_s: float = GRACE_S) -> JobOptions:
        return JobOptions(
            name, sweep, self.priority, self.policy, self.max_restarts, self.slots, self.gpus, grace_s=grace_s
        )


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """Options of a command that submits jobs."""

    scheduling: SchedulingOptions
    max_bundle: MaxBundle = 64
    keep: Keep = None
    torch_backend: TorchBackend = None
    trace: Annotated[bool, option("Each rank writes what it does, for `fleet trace JOB` afterwards.", "--trace")] = (
        False
    )
    dry_run: DryRun = False
    as_json: AsJson = False
    cluster: PatientClusterOptions


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of `fleet run`."""

    workers: Annotated[int | None, option("Number of ranks.", default="one per core, or per Slurm task")] = None
    timeout: Timeout = 60.0
    log_dir: Annotated[Path | None, option("Folder for rank-N.log files.", default="none")] = None
    max_bundle: MaxBundle = 64
    dashboard: Annotated[bool, option("Print the address of a page that shows the job as it runs.", "--dashboard")] = (
        False
    )
    transport: Annotated[str, option("Between local ranks: tcp or ipc.")] = "tcp"
    orchestrator: OrThisMachine = None
    scheduling: SchedulingOptions
    output: OutputFolder = None
    max_output: MaxOutput = 1024
    keep: Keep = None
    torch_backend: TorchBackend = None
    trace: TraceFile = None
    report: Annotated[
        Path | None, option("HTML file for a report of the job, with pictures of what each rank did.", default="none")
    ] = None
    dry_run: DryRun = False
    stdin: Annotated[
        str | None, option("Who reads standard input: none, 0 (rank 0), or all.", default="0; on a cluster none")
    ] = None
    grace: Annotated[
        float,
        option(
            "Seconds that the job goes on without this command, while its connection is cut off.",
            check=number(0, GRACE_AT_MOST_S, f"be a number of seconds from 0 to {GRACE_AT_MOST_S:g}"),
        ),
    ] = GRACE_S
    secret_file: SecretFile = None
    insecure: Insecure = False

    @property
    def traces(self) -> bool:
        """Whether ranks write what they do."""
        return self.trace is not None or self.report is not None


@dataclass(frozen=True)
class DaemonOptions:
    """Options of an orchestrator and of a worker."""

    metrics_port: Annotated[
        int | None,
        option(
            "Port of /metrics and /healthz, and of an orchestrator's page.",
            check=port,
            default="FLEET_METRICS_PORT, that before --bind's, in a worker none",
        ),
    ] = None
    metrics_host: Annotated[
        str | None, option("Address to serve them at.", default="FLEET_METRICS_HOST, 127.0.0.1")
    ] = None
    secret_file: SecretFile = None
    insecure: Insecure = False

    def metrics_at(self) -> tuple[str | None, int] | None:
        """None: nowhere. Without a host, the process that serves them chooses one."""
        port = config.metrics_port() if self.metrics_port is None else self.metrics_port
        return None if port is None else (self.metrics_host or config.metrics_host(), port)


# Commands


class Command(TyperCommand):
    """A command whose help gives its flags no type, since they take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        return flags_without_type(super().get_params(ctx))


class Group(TyperGroup):
    """The same for a command with commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        return flags_without_type(super().get_params(ctx))


def flags_without_type(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


def command(
    app: typer.Typer, name: str, usage: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declares a command of the app. Each parameter that is a group becomes the options of the group, in its place."""

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def called(**given: Any) -> None:
            function(**_grouped(function, given))

        options = list(_options(function))
        vars(called)["__signature__"] = Signature(options)  # typer looks there, and at the annotations
        called.__annotations__ = {option.name: option.annotation for option in options}
        app.command(name, cls=Command, options_metavar=usage)(called)
        return function

    return declare


def _options(of: Any) -> Iterator[Parameter]:
    """The options of a command or a group, with those of the groups in it."""
    types = get_type_hints(of, include_extras=True)
    for parameter in signature(of).parameters.values():
        if is_dataclass(kind := types[parameter.name]):
            yield from _options(kind)
        else:
            yield parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=kind)


def _grouped(of: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command or a group, from the values of all options."""
    types, found = get_type_hints(of, include_extras=True), dict[str, Any]()
    for name in signature(of).parameters:
        is_group = is_dataclass(types[name])
        found[name] = types[name](**_grouped(types[name], given)) if is_group else given[name]
    return found
