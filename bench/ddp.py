"""Benchmark of data parallel training on this machine: steps per second on Gloo, on fleet, and without communication.

    python bench/ddp.py [--models mlp,conv,gpt] [--world-sizes 2,4,8] [--systems ...] [--rounds 2] [--steps 10]
                        [--json FILE] [--plot FILE]
    python bench/ddp.py --from FILE [--plot FILE]

gloo is DistributedDataParallel on Gloo under torchrun; zero-words is the same script, unchanged, under `fleet run
--torch-backend fleet`; fleet is the backend fleet by name; data-parallel is fleet.torch.DataParallel; ceiling is the same step
without communication, so the ranks' models differ; together is the ceiling with an all_reduce of one number in each step, so
that ranks wait for the last one. fsdp-gloo and fsdp-fleet are fully_shard, of the first model alone. bench/ddp_models.py has
the models.

Each round runs all systems in turn, in new processes. A run's figure is the mean of its ranks' median steps; a cell is the
median of the rounds. The share of communication is what a step takes beyond the ceiling's. CPU time is user and system time of
a rank in a step: other programs on the machine disturb it less.

All systems that train one model must end with the same loss; the exit code is 1 if they do not. A run that fails is told, and
tried again (tries.py); a cell without a run that has succeeded is shown as failed, and has no record. --json is written after
each world size, so that what was measured stays.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tries import seconds_of

MODELS = ("mlp", "conv", "gpt")
# By system: what starts the ranks, and the wrapper and the backend that ddp_rank.py is given.
FLEET_RUN = ("fleet", "run", "--workers")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")
ZERO_WORDS = ("fleet", "run", "--torch-backend", "fleet", "--workers")
SYSTEMS = {
    "gloo": (TORCHRUN, "ddp", "gloo"),
    "zero-words": (ZERO_WORDS, "ddp", "gloo"),
    "fleet": (FLEET_RUN, "ddp", "fleet"),
    "data-parallel": (FLEET_RUN, "data-parallel", "none"),
    "fsdp-gloo": (TORCHRUN, "fsdp", "gloo"),
    "fsdp-fleet": (FLEET_RUN, "fsdp", "fleet"),
    "together": (FLEET_RUN, "together", "none"),
    "ceiling": (FLEET_RUN, "ceiling", "none"),
}
RANK = Path(__file__).resolve().with_name("ddp_rank.py")
APART = ("together", "ceiling")  # each rank trains a model of its own
LOSS_TOLERANCE = 1e-3  # relative: additions come in other orders
RUN_WITHIN_S = 180
ZERO_WORDS_AT_LEAST = 0.97  # of what the backend by name reaches

Records = Sequence[dict[str, Any]]


def main() -> int:
    options = parse()
    if options.read:
        records: list[dict[str, Any]] = json.loads(options.read.read_text(encoding="utf-8"))
        for model, world_size in dict.fromkeys((record["model"], record["world_size"]) for record in records):
            report(model, world_size, [r for r in records if (r["model"], r["world_size"]) == (model, world_size)])
        equal = True
    else:
        records, equal = measure_all(options)
    if options.plot and records:
        plot(records, options.plot)
    return 0 if equal else 1


def measure_all(options: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """All records, and whether all losses agree. Reports each number of ranks once it is measured."""
    records: list[dict[str, Any]] = []
    equal, started = True, time.perf_counter()
    for model in options.models:
        for world_size in options.world_sizes:
            systems = [s for s in options.systems if model == options.models[0] or not s.startswith("fsdp")]
            found, agreed = measure(model, world_size, systems, options.rounds, options.steps)
            records, equal = records + found, equal and agreed
            report(model, world_size, found, systems)
            if options.json:
                options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    return records, equal


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=words(MODELS), default=list(MODELS))
    parser.add_argument("--world-sizes", type=lambda text: [int(word) for word in text.split(",")], default=[2, 4, 8])
    parser.add_argument("--systems", type=words(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG or SVG; needs matplotlib")
    parser.add_argument("--from", dest="read", type=Path, help="report what --json has written, and measure nothing")
    options = parser.parse_args()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error(
            "--plot needs matplotlib, which is not installed: leave --plot out, and plot what --json has written"
        )
    return options


def words(legal: Any) -> Any:
    """A type of argparse: some of the legal words, in their order on the command line."""

    def parsed(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [word for word in found if word not in legal]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: must be of {', '.join(legal)}")
        return found

    return parsed


def measure(
    model: str, world_size: int, systems: Sequence[str], rounds: int, steps: int
) -> tuple[list[dict[str, Any]], bool]:
    """The records of one model on one number of ranks, and whether the losses agree."""
    found: dict[str, list[dict[str, float]]] = {system: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            if (figures := run(system, model, world_size, steps)) is not None:
                found[system].append(figures)
    records = [
        {
            "bench": "ddp",
            "system": system,
            "model": model,
            "world_size": world_size,
            "steps_per_s": statistics.median(1 / one["step_s"] for one in runs),
            "cpu_s": statistics.median(one["cpu_s"] / world_size for one in runs),
            "rounds": len(runs),
            "steps": steps,
        }
        for system, runs in found.items()
        if runs
    ]
    return records, agree({system: runs[-1]["loss"] for system, runs in found.items() if runs})


def run(system: str, model: str, world_size: int, steps: int) -> dict[str, float] | None:
    """What ddp_rank.py writes: step_s, cpu_s of all ranks, loss. None if the ranks have failed."""
    starter, wrapper, backend = SYSTEMS[system]
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder, "result")
        script = [str(RANK), wrapper, backend, model, str(steps), str(into)]
        command = [sys.executable, "-m", *starter, str(world_size), *script]
        what = f"{system} of {model} on {world_size} ranks"
        if seconds_of(what, command, RUN_WITHIN_S, {"OMP_NUM_THREADS": "1"}) is None:
            return None
        found: dict[str, float] = json.loads(into.read_text(encoding="utf-8"))
    return found


def agree(losses: dict[str, float]) -> bool:
    """Whether the losses are the same in all systems that train one model. Tells if they are not."""
    trained = {system: loss for system, loss in losses.items() if system not in APART}
    if trained and max(trained.values()) - min(trained.values()) > LOSS_TOLERANCE * max(trained.values()):
        print(f"note: the losses after the last step differ: {trained}")
        return False
    return True


def report(model: str, world_size: int, records: Records, systems: Sequence[str] = ()) -> None:
    """Prints the rows of one model and one number of ranks. A system without a record has failed."""
    rates = {record["system"]: record["steps_per_s"] for record in records}
    ceiling = rates.get("ceiling", 0.0)
    print(f"\n{model}, {world_size} ranks")
    print(f"{'system':14}{'steps/s':>9}{'of gloo':>9}{'of ceiling':>12}{'communication':>15}{'CPU ms/rank':>13}")
    for record in records:
        system, rate = record["system"], record["steps_per_s"]
        base = rates.get("fsdp-gloo" if system.startswith("fsdp") else "gloo", 0.0)
        of_base = f"{rate / base:.2f} x" if base else ""
        of_ceiling, share = (f"{rate / ceiling:.2f}", f"{max(0.0, 1 - rate / ceiling):.0%}") if ceiling else ("", "")
        print(f"{system:14}{rate:9.2f}{of_base:>9}{of_ceiling:>12}{share:>15}{record['cpu_s'] * 1e3:13.1f}")
    for system in systems:
        if system not in rates:
            print(f"{system:14}{'failed':>9}")
    for slow, fast in (
        ("gloo", "zero-words"),
        ("gloo", "fleet"),
        ("gloo", "data-parallel"),
        ("fsdp-gloo", "fsdp-fleet"),
    ):
        if rates.get(fast, float("inf")) < rates.get(slow, 0.0):
            print(f"note: {fast} is slower than {slow}")
    if "zero-words" in rates and rates["zero-words"] < ZERO_WORDS_AT_LEAST * rates.get("fleet", 0.0):
        print(f"note: zero-words reaches {rates['zero-words'] / rates['fleet']:.2f} of fleet")
    sys.stdout.flush()


def plot(records: Records, file: Path) -> None:
    """Steps per second relative to Gloo's: a panel for each model, bars of each system beside each other by world size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(record["model"] for record in records))
    figure, panels = plt.subplots(
        1, len(models), figsize=(2 + 4.5 * len(models), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, model in zip(panels[0], models, strict=True):
        here = {(r["system"], r["world_size"]): r["steps_per_s"] for r in records if r["model"] == model}
        worlds = sorted({world_size for _, world_size in here})
        systems = [system for system in SYSTEMS if any(system == other for other, _ in here)]
        for number, system in enumerate(systems):
            base = "fsdp-gloo" if system.startswith("fsdp") else "gloo"
            places = [column + (number - len(systems) / 2) * 0.8 / len(systems) for column in range(len(worlds))]
            ratios = [here[system, n] / here[base, n] if (base, n) in here else 0.0 for n in worlds]
            color = {"together": "0.6", "ceiling": "0.8"}.get(system) or f"C{list(SYSTEMS).index(system)}"
            panel.bar(places, ratios, 0.8 / len(systems), align="edge", label=system, color=color)
        panel.set_xticks(range(len(worlds)), [f"{world_size} ranks" for world_size in worlds])
        panel.set_title(model)
        panel.axhline(1, color="k", linewidth=0.8)
    panels[0][0].set_ylabel("steps per second, relative to Gloo")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
