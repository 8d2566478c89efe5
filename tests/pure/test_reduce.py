"""The arithmetic against a wide reference: one combination rounds once, and what has no meaning is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fleet.collectives import reduce
from fleet.collectives.header import DTYPES, REDUCTIONS
from fleet.errors import UsageError
from tests.wanted import needs_torch, torch

OPS = tuple(filter(None, REDUCTIONS))
NAMES = tuple(filter(None, DTYPES))
FLOATS = ("float16", "float32", "float64")
COMPLEX = ("complex64", "complex128")
INTEGERS = tuple(name for name in NAMES if "int" in name)


def legal(op: str, dtype: str) -> bool:
    if op in ("mean", "premul_sum"):
        return dtype in (*FLOATS, *COMPLEX, "bfloat16")
    if op in ("band", "bor", "bxor"):
        return "int" in dtype or dtype == "bool"
    return not (op in ("min", "max") and dtype in COMPLEX)


FACTOR = 0.5


def parsed(op: str, dtype: str) -> tuple[str, float]:
    return reduce.parse(reduce.PremulSum(FACTOR) if op == "premul_sum" else op, dtype)


def combination(op: str, dtype: str) -> Any:
    kernel = reduce.kernel(op, dtype, 3, FACTOR)
    return (lambda mine, into: kernel.many([into.copy(), mine], into, last=False)) if kernel.half else kernel.combine


def completion(op: str, dtype: str) -> Any:
    """Of three ranks; None: nothing is left to do."""
    kernel = reduce.kernel(op, dtype, 3, FACTOR)
    return kernel.finish_alone if kernel.finishes else None


def completed(op: str, wide: Any) -> Any:
    return wide / 3 if op == "mean" else wide * FACTOR


LEGAL = [(op, dtype) for op in OPS for dtype in NAMES if legal(op, dtype)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", NAMES)
def test_only_what_has_a_meaning_is_legal(op: str, dtype: str) -> None:
    if legal(op, dtype):
        assert parsed(op, dtype)[0] == op
    else:
        with pytest.raises(UsageError, match=dtype):
            parsed(op, dtype)


def test_refusals_say_what_is_legal() -> None:
    with pytest.raises(UsageError, match=r"mean of int32 .* op='sum'"):
        reduce.parse("mean", "int32")
    with pytest.raises(UsageError, match="complex64 has no order, so no min"):
        reduce.parse("min", "complex64")
    named = ", ".join(op for op in OPS if op != "premul_sum")
    for unknown in ("", "avg", "SUM", "premul_sum"):
        with pytest.raises(UsageError, match=f"op is {unknown!r}: it must be one of {named}, or fleet.premul_sum"):
            reduce.parse(unknown, "float32")


def apply(op: str, a: Any, b: Any) -> Any:
    """The reference on wide or exact values."""
    if op in ("sum", "mean", "premul_sum"):
        return a + b
    if op == "prod":
        return a * b
    return np.minimum(a, b) if op == "min" else np.maximum(a, b)


@pytest.mark.parametrize(("op", "dtype"), [pair for pair in LEGAL if pair[1] in FLOATS])
def test_floats_round_once(op: str, dtype: str) -> None:
    random = np.random.default_rng(1)
    mine, into = (random.uniform(-9, 9, 1001).astype(dtype) for _ in range(2))
    before = mine.copy()
    want = apply(op, into.astype(np.float64), mine.astype(np.float64)).astype(dtype)
    combination(op, dtype)(mine, into)
    np.testing.assert_array_equal(into, want, strict=True)
    np.testing.assert_array_equal(mine, before)
    if finish := completion(op, dtype):
        assert op in ("mean", "premul_sum")
        finish(into)
        np.testing.assert_array_equal(into, completed(op, want.astype(np.float64)).astype(dtype), strict=True)
    else:
        assert op not in ("mean", "premul_sum")


@pytest.mark.parametrize(("op", "dtype"), [pair for pair in LEGAL if pair[1] in COMPLEX])
def test_complex_numbers(op: str, dtype: str) -> None:
    random = np.random.default_rng(2)
    mine, into = ((random.uniform(-9, 9, 101) + 1j * random.uniform(-9, 9, 101)).astype(dtype) for _ in range(2))
    want = apply(op, into.astype(np.complex128), mine.astype(np.complex128))
    combination(op, dtype)(mine, into)
    tolerance = 1e-5 if dtype == "complex64" else 1e-13
    np.testing.assert_allclose(into, want, rtol=tolerance, atol=tolerance)
    if finish := completion(op, dtype):
        finish(into)
        np.testing.assert_allclose(into, completed(op, want), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("op", "dtype"), [pair for pair in LEGAL if pair[1] in INTEGERS])
def test_integers_wrap_around(op: str, dtype: str) -> None:
    bounds = np.iinfo(dtype)
    edge = [bounds.min, bounds.max, 0, 1, 2, 3, bounds.max // 2 + 1]
    mine = np.array([a for a in edge for _ in edge], dtype)
    into = np.array([b for _ in edge for b in edge], dtype)
    exact = [apply_exactly(op, int(a), int(b)) for a, b in zip(into, mine, strict=True)]
    span = 1 << bounds.bits
    want = np.array([(value - bounds.min) % span + bounds.min for value in exact], dtype)
    combination(op, dtype)(mine, into)
    np.testing.assert_array_equal(into, want, strict=True)
    assert completion(op, dtype) is None


def apply_exactly(op: str, a: int, b: int) -> int:
    bits = {"band": a & b, "bor": a | b, "bxor": a ^ b}
    return {"sum": a + b, "prod": a * b, "min": min(a, b), "max": max(a, b), **bits}[op]


@pytest.mark.parametrize(("op", "word"), [("sum", any), ("max", any), ("prod", all), ("min", all)])
def test_bools_are_or_and_and(op: str, word: Any) -> None:
    mine, into = np.array([0, 0, 1, 1], bool), np.array([0, 1, 0, 1], bool)
    want = [word(pair) for pair in zip(mine, into, strict=True)]
    combination(op, "bool")(mine, into)
    assert into.dtype == bool
    assert into.tolist() == want


@needs_torch
@pytest.mark.parametrize("op", [op for op in OPS if legal(op, "bfloat16")])
def test_bfloat16_rounds_once(op: str) -> None:
    generator = torch.Generator().manual_seed(3)
    mine, into = (torch.empty(1001).uniform_(-9, 9, generator=generator).bfloat16() for _ in range(2))
    before = mine.clone()
    want = torch.from_numpy(apply(op, into.double().numpy(), mine.double().numpy())).bfloat16()
    flat = into.view(torch.uint16).numpy()
    combination(op, "bfloat16")(mine.view(torch.uint16).numpy(), flat)
    assert torch.equal(into, want)
    assert torch.equal(mine, before)
    finish = completion(op, "bfloat16")
    assert (finish is not None) == (op in ("mean", "premul_sum"))
    if finish is not None:
        finish(flat)
        assert torch.equal(into, completed(op, want.double()).bfloat16())


@needs_torch
@pytest.mark.parametrize("op", ["min", "max"])
@pytest.mark.parametrize("dtype", [*FLOATS, "bfloat16"])
def test_not_a_number_is_never_lost(op: str, dtype: str) -> None:
    """Whichever rank has it: else the result would hang on the order of the ranks."""
    nan = float("nan")
    mine, into = (torch.tensor(row, dtype=getattr(torch, dtype)) for row in ([nan, 1.0, nan], [1.0, nan, nan]))
    kernel = combination(op, dtype)
    if dtype == "bfloat16":
        kernel(mine.view(torch.uint16).numpy(), into.view(torch.uint16).numpy())
    else:
        kernel(mine.numpy(), into.numpy())
    assert into.isnan().all()


@pytest.mark.parametrize(("op", "dtype"), LEGAL)
def test_nothing_is_combined_to_nothing(op: str, dtype: str) -> None:
    empty = np.empty(0, "uint16" if dtype == "bfloat16" else dtype)
    combination(op, dtype)(empty.copy(), empty)
    if finish := completion(op, dtype):
        finish(empty)


@needs_torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_accumulated_in_float32_and_rounded_once(dtype: str) -> None:
    """257 ones: bfloat16 added one by one would stick at 256."""
    one = torch.full((3,), 1.0, dtype=getattr(torch, dtype)).view(torch.uint16).numpy()
    parts = [one.view("float16") if dtype == "float16" else one for _ in range(257)]
    out = np.empty_like(parts[0])
    reduce.kernel("sum", dtype, 257, 1.0).many(parts, out)
    wide = torch.from_numpy(out.view(np.uint16)).view(getattr(torch, dtype)).double()
    assert wide.tolist() == [torch.tensor(257.0, dtype=getattr(torch, dtype)).item()] * 3


@needs_torch
@pytest.mark.parametrize("dtype", ["int64", "float32", "float16", "bfloat16"])
def test_prefixes(dtype: str) -> None:
    parts = [torch.full((5,), rank + 1, dtype=getattr(torch, dtype)) for rank in range(4)]
    flat = [part.view(torch.uint16).numpy() if dtype == "bfloat16" else part.numpy() for part in parts]
    reduce.kernel("sum", dtype, 4, 1.0).prefixes(flat)
    assert [part[0].item() for part in parts] == [1, 3, 6, 10]


@needs_torch
@pytest.mark.parametrize("dtype", reduce.HALVES)
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_halves_longer_than_the_scratch_are_combined_in_blocks_and_leave_no_long_arrays(dtype: str, extra: int) -> None:
    length = 2 * reduce.SCRATCH_ELEMENTS + extra
    tensors = [(torch.arange(length) % 97 + rank).to(getattr(torch, dtype)) for rank in range(3)]
    parts = [
        tensor.view(torch.int16).numpy().view(np.float16 if dtype == "float16" else np.uint16) for tensor in tensors
    ]
    out = parts[0].copy()
    reduce.kernel("mean", dtype, 3, 1.0).many([out, *parts[1:]], out)
    expected = (sum(tensor.float() for tensor in tensors) / 3).to(getattr(torch, dtype))
    np.testing.assert_array_equal(out.view(np.int16), expected.view(torch.int16).numpy())
    assert reduce._of_thread.arrays.nbytes <= 2 * 4 * reduce.SCRATCH_ELEMENTS


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("world_size", [2, 8])
def test_means_of_a_power_of_two_have_the_bits_of_quotients(dtype: str, world_size: int) -> None:
    tiny = np.finfo(dtype).smallest_subnormal
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1 / 3, tiny, 3 * tiny, 5 * tiny, np.finfo(dtype).max], dtype)
    x = np.concatenate([odd, np.sin(np.arange(1000)).astype(dtype) * dtype_range(dtype)])
    out = x.copy()
    reduce.kernel("mean", dtype, world_size, 1.0).finish(out)
    np.testing.assert_array_equal(out.view(np.uint8), (x / x.dtype.type(world_size)).view(np.uint8))


def dtype_range(dtype: str) -> Any:
    """Factors from the smallest to the largest exponent."""
    info = np.finfo(dtype)
    return np.ldexp(np.ones(1000), np.linspace(info.minexp - 20, info.maxexp - 1, 1000).astype(int)).astype(dtype)
