"""Benchmark of data parallel training on this machine: steps per second of an MLP of 10 M parameters.

    python bench/ddp.py [--world-sizes 2,4,8] [--systems ...] [--rounds 3] [--steps 10] [--batch-size 32] [--json FILE]

gloo is DistributedDataParallel on Gloo under torchrun; fleet is the same under `fleet run` with the backend fleet;
data-parallel is fleet.torch.DataParallel; ceiling is the same step without communication, so the ranks' models differ. Each
round runs all of them in turn, in new processes. A run's figure is that of its median step; a cell is the median of the
rounds. All systems but the ceiling must end with the same loss.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SYSTEMS = ("gloo", "fleet", "data-parallel", "ceiling")
RANK = Path(__file__).resolve().with_name("ddp_rank.py")
LOSS_TOLERANCE = 1e-3  # relative: additions come in other orders
RUN_WITHIN_S = 300


def main() -> int:
    options = parse()
    records: list[dict[str, Any]] = []
    for world_size in options.world_sizes:
        rates: dict[str, list[float]] = {system: [] for system in options.systems}
        losses: dict[str, float] = {}
        for _ in range(options.rounds):
            for system in options.systems:
                step_s, losses[system] = run(system, world_size, options.steps, options.batch_size)
                rates[system].append(1 / step_s)
        check_losses(losses)
        cells = {system: statistics.median(found) for system, found in rates.items()}
        print(f"{world_size} ranks: {', '.join(describe(system, cells) for system in cells)}", flush=True)
        for system, steps_per_s in cells.items():
            records.append(
                {"bench": "ddp", "system": system, "model": "mlp", "world_size": world_size, "steps_per_s": steps_per_s}
            )
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--world-sizes", type=lambda text: [int(word) for word in text.split(",")], default=[2, 4, 8])
    parser.add_argument("--systems", type=lambda text: text.split(","), default=SYSTEMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="rows of each rank in a step")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def run(system: str, world_size: int, steps: int, batch_size: int) -> tuple[float, float]:
    """Seconds of the median step, and the mean loss of all ranks in the last one."""
    python = [sys.executable, "-m"]
    starter = (
        ["torch.distributed.run", "--standalone", "--nproc-per-node"]
        if system == "gloo"
        else ["fleet", "run", "--workers"]
    )
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder, "result")
        command = [*python, *starter, str(world_size), str(RANK), system, str(steps), str(batch_size), str(into)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=RUN_WITHIN_S, check=False
        )
        if ended.returncode:
            raise SystemExit(f"{system} with {world_size} ranks has failed:\n{ended.stdout}{ended.stderr}")
        step_s, loss = json.loads(into.read_text(encoding="utf-8"))
    return step_s, loss


def check_losses(losses: dict[str, float]) -> None:
    trained = {system: loss for system, loss in losses.items() if system != "ceiling"}
    if trained and max(trained.values()) - min(trained.values()) > LOSS_TOLERANCE * max(trained.values()):
        raise SystemExit(f"the losses after the last step differ: {trained}")


def describe(system: str, cells: dict[str, float]) -> str:
    text = f"{system} {cells[system]:.2f} steps/s"
    compared = [
        (other, cells[system] / cells[other]) for other in ("gloo", "ceiling") if other in cells and other != system
    ]
    return f"{text} ({', '.join(f'{ratio:.2f} of {other}' for other, ratio in compared)})"


if __name__ == "__main__":
    sys.exit(main())
