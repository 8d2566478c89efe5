"""python -m tests.sim FROM:TO — runs these seeds, and tells how many schedules, events and faults of each kind there were."""

from __future__ import annotations

import sys
import time
from collections import Counter

from tests.sim.schedule import run


def main() -> None:
    first, _, last = sys.argv[1].partition(":")
    faults: Counter[str] = Counter()
    events = failed = 0
    started = time.monotonic()
    for seed in range(int(first), int(last)):
        try:
            found, count = run(seed)
        except AssertionError as error:
            failed += 1
            print(error if failed <= 3 else str(error).splitlines()[0], flush=True)
            continue
        faults.update(found)
        events += count
    print(f"{int(last) - int(first)} schedules, {failed} failed, {events} events in {time.monotonic() - started:.0f} s")
    print(", ".join(f"{count} x {fault}" for fault, count in faults.most_common()))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
