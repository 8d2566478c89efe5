"""What a task's call and result become: a pickle, and beside it what is too large for one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet import pickling
from fleet.bus.blobs import Shelf

APART = 1 << 16


@dataclass
class Holder:
    inside: Any


def whole(parts: pickling.Parts) -> bytes:
    return b"".join(parts)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: ((x,), {}), lambda x: {"a": [x, x]}, Holder])
@pytest.mark.parametrize("kind", [bytes, bytearray, lambda data: data.decode("latin1")])
@pytest.mark.parametrize("size", [0, 1, APART - 64, APART, 5 * APART + 3])
def test_text_and_bytes_of_any_size_come_back(wrap: Any, kind: Any, size: int) -> None:
    value = wrap(kind(bytes(range(256)) * (size // 256) + b"\xe9" * (size % 256)))
    data, buffers = pickling.dumps(value, APART)
    assert len(data) < APART
    assert pickling.loads(data or whole(buffers[0]), [whole(b) for b in buffers[0 if data else 1 :]]) == value


@pytest.mark.parametrize("wrap", [lambda x: (x, 1), Holder, lambda x: [x] * 100])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_large_bytes_are_not_copied_into_a_pickle(wrap: Any, kind: Any) -> None:
    value = kind(1 << 20)
    data, buffers = pickling.dumps(wrap(value), APART)
    assert data == b""
    assert any(part is value for part in buffers[0])


def test_arrays_lie_beside_a_pickle_whatever_its_size() -> None:
    array = np.arange(1 << 16)
    data, buffers = pickling.dumps((b"x" * (1 << 20), array), APART)
    assert (data, len(buffers)) == (b"", 2)
    text, found = pickling.loads(whole(buffers[0]), [bytearray(whole(buffers[1]))])
    assert len(text) == 1 << 20
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("shared", [True, False])
def test_a_blob_has_its_parts_one_after_the_other(tmp_path: Path, shared: bool) -> None:
    directory = Path("/dev/shm") if shared else None
    shelf = Shelf(directory)
    blob = shelf.blob([b"ab", b"", np.frombuffer(b"cdef", dtype="<u2"), bytearray(b"g")])
    assert blob.size_bytes == 7
    assert blob.piece(0, 4) + blob.piece(4, 100) == b"abcdefg"
    assert bool(blob.path) == shared
    blob.release()
    shelf.close()
