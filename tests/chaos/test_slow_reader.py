"""Output that nobody reads for a while: it waits where it is, and none of it is lost."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path

import pytest
from commands import started

WORKERS, LINES = 8, 6000

# Many small writes: each can be a message of its own, and all of them together are more than queues hold.
CHATTY = """\
import os, pathlib, sys
rank = os.environ["RANK"]
for number in range(int(sys.argv[1])):
    os.write(1, b"rank %s line %d\\n" % (rank.encode(), number))
pathlib.Path(sys.argv[2], rank).touch()
"""


@pytest.mark.chaos
def test_a_client_whose_reader_waits_loses_nothing(tmp_path: Path) -> None:
    """As `fleet run chatty.py --workers 8 | (sleep 20; tail -1)`, with an event instead: all ranks have printed everything."""
    script, done = tmp_path / "chatty.py", tmp_path / "done"
    script.write_text(CHATTY)
    done.mkdir()
    with started("run", "--workers", str(WORKERS), str(script), str(LINES), str(done)) as client:
        while len(list(done.iterdir())) < WORKERS:
            assert client.poll() is None, client.communicate()
            time.sleep(0.05)  # files send no event
        output, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors
    found = Counter(re.findall(r"rank (\d+) line (\d+)$", output, re.M))
    missing = {(str(rank), str(number)) for rank in range(WORKERS) for number in range(LINES)} - found.keys()
    assert not missing, f"{len(missing)} lines are missing, such as {sorted(missing)[:3]}"
    assert set(found.values()) == {1}
