"""Checks of the arguments of collective calls, with a sentence for each mistake. Knows shapes and ranks, no peers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any
from zlib import crc32

from fleet.collectives.buffer import Array, Buffer, Parts, as_buffer, as_parts
from fleet.collectives.header import DTYPES
from fleet.errors import UsageError

TAGS = 1 << 31


def check_rank(rank: int, name: str, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise UsageError(f"{name} is {rank}: ranks of this world are 0 to {world_size - 1}")


def check_ranks(ranks: Sequence[int], rank: int, world_size: int) -> None:
    """Raises UsageError for ranks that cannot form a communicator with this rank in it."""
    for other in ranks:
        check_rank(other, "a rank of ranks", world_size)
    if len(set(ranks)) < len(ranks):
        raise UsageError(f"ranks is {list(ranks)}: each rank may be in it once")
    if rank not in ranks:
        raise UsageError(f"ranks is {list(ranks)}: only its members call this, and this is rank {rank}")


def check_peer(peer: int | None, name: str, tag: int, rank: int, world_size: int) -> None:
    """Raises UsageError for a tag, or for a peer that is no other rank; None: any rank."""
    if peer is not None:
        check_rank(peer, name, world_size)
    if not 0 <= tag < TAGS:
        raise UsageError(f"tag is {tag}: it must be from 0 to {TAGS - 1}")
    if peer == rank:
        raise UsageError(f"{name} is this rank itself ({rank}): copy the array instead")


def whole_of(
    x: Any, name: str, part: Buffer, part_name: str, world_size: int, rank: int = -1, *, written: bool
) -> tuple[Buffer | Parts, int]:
    """The argument that has one part for each rank: one array, or a list of arrays; and 0, or a digest of uneven lengths.

    One array has the parts joined along dimension 0, or stacked. `part` is this rank's own one. Parts of a list may differ in
    length where `rank` is given, which all ranks then do alike. Raises UsageError for shapes and dtypes that do not go together.
    """
    is_list = isinstance(x, list | tuple)
    whole = as_parts(x, name, world_size, written) if is_list else as_buffer(x, name, written)
    if whole.dtype != part.dtype:
        raise UsageError(f"{name} has dtype {whole.dtype} and {part_name} has {part.dtype}: they must be the same")
    if isinstance(whole, Buffer):
        stacked = (world_size, *part.shape)
        joined = (world_size * part.shape[0], *part.shape[1:]) if part.shape else stacked
        if whole.shape not in (joined, stacked):
            raise UsageError(
                f"{name} has shape {list(whole.shape)}: for {world_size} ranks with {part_name} of shape "
                f"{list(part.shape)} it must be {list(joined)} or {list(stacked)}"
            )
        return whole, 0
    lengths = [len(flat) for flat in whole.flats]
    is_even = lengths == [len(part.flat)] * world_size
    if not is_even and (rank < 0 or lengths[rank] != len(part.flat)):
        wanted = "each part" if rank < 0 else f"{name}[{rank}]"
        raise UsageError(
            f"{name} has parts of {lengths} elements: with {part_name} of shape {list(part.shape)}, {wanted} must have "
            f"{len(part.flat)}"
        )
    return whole, 0 if is_even else crc32(struct.pack(f"<{world_size}Q", *lengths))


def check_empty(shape: Sequence[int], dtype: str) -> None:
    if min(shape, default=0) < 0:
        raise UsageError(f"shape is {list(shape)}: no dimension may be negative")
    if dtype not in DTYPES or not dtype:
        raise UsageError(f"dtype is {dtype}: it must be one of {', '.join(filter(None, DTYPES))}")


def parts_of(whole: Buffer | Parts, world_size: int) -> list[Array]:
    """One part per rank, flat."""
    if isinstance(whole, Parts):
        return whole.flats
    return list(whole.flat.reshape(world_size, -1)) if whole.flat.size else [whole.flat] * world_size


def splits_of(name: str, buffer: Buffer, splits: Sequence[int] | None, world_size: int) -> list[Array]:
    """Parts of a buffer with as many rows each as `splits` says; None: equal ones."""
    rows = buffer.shape[0] if buffer.shape else 1
    if splits is None:
        if rows % world_size:
            raise UsageError(f"{name} has {rows} rows, which do not divide by {world_size} ranks: give {name}_splits")
        splits = [rows // world_size] * world_size
    if len(splits) != world_size or min(splits) < 0 or sum(splits) != rows:
        raise UsageError(
            f"{name}_splits is {list(splits)}: it must have {world_size} numbers from 0 that add up to {rows}, "
            f"the rows of {name}"
        )
    per_row = len(buffer.flat) // rows if rows else 0
    return [buffer.flat[a * per_row : b * per_row] for a, b in pairwise(accumulate(splits, initial=0))]
