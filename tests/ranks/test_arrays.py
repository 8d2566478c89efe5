"""Views, subclasses and arrays that overlap each other, on every path: right, or refused before anything is sent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from grid import read_only
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from fleet.collectives.buffer import as_buffer, overlaps_itself
from fleet.collectives.communicator import Communicator
from fleet.errors import UsageError

PATHS = [(1, "ipc"), (3, "ipc"), (3, "shared"), (4, 2)]
LONG = 70_000  # elements: past what goes in one frame, and in one block of shared memory

Views = list[tuple[str, Any, Any]]  # name, the memory, the view of it that takes part


def numpy_views(count: int) -> Views:
    def memory(*shape: int, dtype: Any = np.float64) -> Any:
        return np.zeros(shape, dtype)

    class Named(np.ndarray):
        """As those of other libraries: with a name, and arithmetic of its own."""

        def __iadd__(self, other: Any) -> Any:
            raise TypeError("this is not to be added")

    rows, boxes, turned = memory(count, 3), memory(count, 1, 2), memory(3, count)
    packed = np.zeros(count, [("a", "i1"), ("b", "f8")])
    odd = np.zeros(count * 8 + 1, np.uint8)
    strange, plain, reals = memory(count * 4), memory(count), np.zeros(count, np.complex128)
    matrix, single = memory(count, 2), memory(5)
    return [
        ("a column, with a new axis", rows, rows[:, 0][None, :]),
        ("a dimension of size 1, and steps", boxes, boxes[::2, :, 1]),
        ("the last first", plain, plain[::-1]),
        ("every third from the end", plain, plain[::-3]),
        ("transposed", turned, turned.T),
        ("of a structure, not aligned", packed, packed["b"]),
        ("contiguous, not aligned", odd, odd[1:].view(np.float64)),
        ("strides that interleave and meet nowhere", strange, as_strided(strange, (3, count // 2), (8, 24))),
        ("the imaginary parts", reals, reals.imag),
        ("a matrix", matrix, matrix.view(np.matrix)),
        ("a matrix's column", matrix, matrix.view(np.matrix)[:, 1]),
        ("a subclass", plain, plain.view(Named)),
        ("a record array's field", packed, packed.view(np.recarray).b),
        ("without a dimension", single, single[2:3].reshape(())),
        ("of size 1, with any stride", single, as_strided(single, (1, 1), (0, 16))),
        ("empty, with stride 0", single, as_strided(single, (0, 3), (0, 0))),
        ("broadcast over a dimension of size 1", single, as_strided(single, (1, 5), (0, 8))),
        ("another name of int64", np.zeros(count, np.longlong), np.zeros(0)),
    ]


def torch_views(count: int) -> Views:
    torch = pytest.importorskip("torch")
    rows, plain, box = torch.zeros(count, 3), torch.zeros(count), torch.zeros(2, 3, count // 2, 2)
    halves, leaf = torch.zeros(count, 2, dtype=torch.bfloat16), torch.zeros(count, requires_grad=True)
    inner = torch.nn.Parameter(torch.zeros(count, 2))
    return [
        ("a column", rows, rows[:, 1]),
        ("a column with new axes", rows, rows[:, 1][None, :, None]),
        ("expanded over a dimension of size 1", plain, plain[None].expand(1, count)),
        ("transposed", rows, rows.T),
        ("channels last", box, box.to(memory_format=torch.channels_last)),
        ("bfloat16, transposed", halves, halves.T),
        ("without a dimension", plain, plain[3]),
        ("one that requires a gradient", leaf, leaf),
        ("a parameter, transposed", inner, inner.T),
    ]


def check(comm: Communicator, name: str, memory: Any, view: Any, to_numpy: Callable[[Any], Any]) -> None:
    n, r = comm.world_size, comm.rank
    values = np.arange(to_numpy(view).size, dtype=np.float64).reshape(to_numpy(view).shape) % 31
    before = to_numpy(memory).copy()
    around = to_numpy(view).copy()
    to_numpy(view)[...] = values + r
    comm.all_reduce(view)
    np.testing.assert_array_equal(to_numpy(view), values * n + n * (n - 1) // 2, err_msg=name)
    to_numpy(view)[...] = values + r
    comm.broadcast(view, root=n - 1)
    np.testing.assert_array_equal(to_numpy(view), values + n - 1, err_msg=name)
    comm.scan(view, "max")
    comm.reduce(view, 0, "min")
    np.testing.assert_array_equal(to_numpy(view), values + n - 1, err_msg=name)
    if n > 1:
        if r == 0:
            comm.send(view, n - 1)
        elif r == n - 1:
            to_numpy(view)[...] = 0
            comm.recv(view, 0)
            np.testing.assert_array_equal(to_numpy(view), values + n - 1, err_msg=name)
    gathered = np.empty((n, *values.shape), around.dtype)
    if around.dtype == np.float64:
        comm.all_gather(gathered, view)
        assert (gathered == values + n - 1).all(), name
        comm.reduce_scatter(view, gathered)
        np.testing.assert_array_equal(to_numpy(view), (values + n - 1) * n, err_msg=name)
    to_numpy(view)[...] = around
    after = to_numpy(memory)
    assert after.tobytes() == before.tobytes(), f"{name}: memory beside the view was changed"


@pytest.mark.parametrize(("n", "transport"), PATHS)
@pytest.mark.parametrize("count", [6, LONG])
def test_views_and_subclasses_of_arrays(run_world: Any, n: int, transport: str | int, count: int) -> None:
    def plain(x: Any) -> Any:
        return x.view(np.ndarray)

    def run(comm: Communicator) -> None:
        for name, memory, view in numpy_views(count):
            check(comm, name, memory, view, plain)

    run_world(n, run, transport=transport)


@pytest.mark.parametrize(("n", "transport"), PATHS)
def test_views_of_tensors(run_world: Any, n: int, transport: str | int) -> None:
    torch = pytest.importorskip("torch")

    def plain(x: Any) -> Any:
        x = x.detach()
        return Halves(x) if x.dtype is torch.bfloat16 else x.numpy()

    class Halves(np.ndarray):
        """A tensor of bfloat16 as an array of float32 that writes to it."""

        def __new__(cls, x: Any) -> Any:
            made = x.float().numpy().view(cls)
            made.tensor = x
            return made

        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            self.tensor.copy_(torch.from_numpy(np.asarray(self)))

    def run(comm: Communicator) -> None:
        for name, memory, view in torch_views(6):
            check(comm, name, memory, view, plain)

    run_world(n, run, transport=transport)


def expanded(*shape: int) -> Any:
    """Writable, and all of its elements are one."""
    return as_strided(np.zeros(1), shape, (0,) * len(shape))


def refused() -> list[tuple[Any, str]]:
    torch = pytest.importorskip("torch")
    return [
        (np.ma.masked_array([1.0, 2, 3], [0, 1, 0]), r"x is a masked array.*pass x\.filled\(value\)"),
        (np.ma.masked_array([1.0, 2, 3]), "x is a masked array"),
        (expanded(3), "expanded view"),
        (expanded(1, 3), "expanded view"),
        (np.lib.stride_tricks.as_strided(np.zeros(6), (3, 4), (8, 8)), "expanded view"),
        (sliding_window_view(np.zeros(6), 3, writeable=True), "expanded view"),
        (as_strided(np.zeros(9), (3,), (4,)), "expanded view"),
        (np.broadcast_to(1.0, 3), "read-only"),
        (read_only(np.zeros((3, 3)))[:, 1], "read-only"),
        (np.zeros(3, ">f8"), "dtype >f8: it must be one of"),
        (np.zeros(3, ">i2")[::-1], "dtype >i2"),
        (np.zeros(3, object), "dtype object"),
        (np.zeros(3, "S3"), "dtype |S3"),
        (np.zeros(3, "m8[s]"), "dtype timedelta64"),
        (np.zeros(3, [("a", "f4"), ("b", "f4")]), "must be one of"),
        (np.zeros(3, np.longdouble), "must be one of"),
        ([np.zeros(3), np.zeros(3)], "x is a list.*in which the parts of all ranks lie one after the other"),
        ((1.0, 2.0), "x is a tuple"),
        (np.float32(3), "x is a float32"),
        (memoryview(bytearray(8)), "x is a memoryview"),
        (torch.zeros(3, 1).expand(3, 4), "expanded view"),
        (torch.zeros(6).as_strided((3, 4), (1, 1)), "expanded view"),
        (torch.zeros(2, device="meta"), "x is on meta"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (torch.zeros(2, 2).to_sparse_csr(), "sparse"),
        (torch.zeros(2, dtype=torch.complex64).conj(), "conjugated"),
        (torch.zeros(2, dtype=torch.complex64).conj().imag, "conjugated"),
        (torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.quint8), "quantized"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "x is a Tensor that is not plain memory"),
        (torch.zeros(2, dtype=torch.complex32), "dtype torch.complex32"),
    ]


@pytest.mark.parametrize(("n", "transport"), PATHS)
def test_what_cannot_take_part_is_refused_before_anything_is_sent(run_world: Any, n: int, transport: str | int) -> None:
    """As x, and as out; nothing is broken by it."""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of some kinds of tensors that they are new or old
        cases = refused()

    def run(comm: Communicator) -> None:
        for x, words in cases:
            for call in (comm.all_reduce, comm.scan):
                with pytest.raises(UsageError, match=words):
                    call(x)
            of_out = words.replace("x is", "out is").replace(r"x\.", r"out\.")
            with pytest.raises(UsageError, match="out has 2 parts" if isinstance(x, list | tuple) else of_out):
                comm.all_gather(x, np.zeros(3))
            assert comm._endpoint.order.recorder.last is None
        total = np.ones(3)
        comm.all_reduce(total)
        assert (total == n).all()

    run_world(n, run, transport=transport)


def test_inputs_need_not_be_writable_nor_their_elements_apart(run_world: Any) -> None:
    def run(comm: Communicator) -> None:
        out = np.empty((3, 2, 5))
        comm.all_gather(out, np.broadcast_to(float(comm.rank), (2, 5)))
        assert (out == np.arange(3.0)[:, None, None]).all()
        comm.all_gather(out, expanded(2, 5))
        assert not out.any()
        total = np.empty(4)
        comm.reduce_scatter(total, sliding_window_view(np.arange(6.0), 4))
        assert (total == 3 * (np.arange(4.0) + comm.rank)).all()

    run_world(3, run)


@pytest.mark.parametrize(
    ("shape", "strides", "want"),
    [
        ((3, 4), (32, 8), False),
        ((3, 4), (8, 24), False),
        ((3, 4), (8, 8), True),
        ((3, 2), (16, 24), False),  # 0 16 32 and 24 40 56
        ((4, 2), (16, 32), True),
        ((3, 4), (-8, 24), False),
        ((1, 4), (0, 8), False),
        ((0, 4), (0, 0), False),
        ((2, 1), (0, 8), True),
        ((3,), (4,), True),
        ((), (), False),
    ],
)
def test_overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...], want: bool) -> None:
    memory = np.zeros(64)[32:]
    view = as_strided(memory, shape, strides)
    assert overlaps_itself(view) == want
    if want:
        with pytest.raises(UsageError, match="expanded view"):
            as_buffer(view, "x", written=True)


def overlapping(n: int, count: int) -> list[tuple[str, Any, slice, slice]]:
    """(name, memory, where one rank's part lies, where all ranks' parts lie)."""
    whole = n * count
    return [
        ("the first part", whole, slice(0, count), slice(0, whole)),
        ("the last part", whole, slice(whole - count, whole), slice(0, whole)),
        ("across two parts", whole + count, slice(count // 2, count // 2 + count), slice(1, whole + 1)),
        ("one element", whole + count - 1, slice(0, count), slice(count - 1, whole + count - 1)),
        ("none", whole + count, slice(0, count), slice(count, whole + count)),
    ]


@pytest.mark.parametrize(("n", "transport"), PATHS)
@pytest.mark.parametrize("count", [6, LONG])
def test_what_comes_in_may_overlap_what_goes_out(run_world: Any, n: int, transport: str | int, count: int) -> None:
    """Each call gives what it gives with a copy of x; asynchronous ones as well."""

    def run(comm: Communicator) -> None:
        def memory(length: int) -> Any:
            return (np.arange(length) * 7 + comm.rank * 3) % 101

        cases: list[tuple[Callable[..., Any], bool]] = [
            (comm.all_gather, False),
            (comm.reduce_scatter, True),
            (lambda out, x, **how: comm.gather(out, x, n - 1, **how), False),
            (lambda out, x, **how: comm.scatter(out, x, n - 1, **how), True),
        ]
        for name, length, one, every in overlapping(n, count):
            for number, (call, shrinks) in enumerate(cases):
                for how in ({}, {"async_op": True}):
                    shared, apart = memory(length), memory(length)
                    out, x = (one, every) if shrinks else (every, one)
                    call(apart[out], apart[x].copy())
                    work = call(shared[out], shared[x], **how)
                    if work is not None:
                        work.wait()
                    np.testing.assert_array_equal(shared, apart, err_msg=f"{name} {number}")
        for shift in (0, 1, n * count - 1):
            shared, apart = memory(n * count + shift), memory(n * count + shift)
            comm.all_to_all(apart[shift:], apart[: n * count].copy())
            comm.all_to_all(shared[shift:], shared[: n * count])
            np.testing.assert_array_equal(shared, apart, err_msg=f"all_to_all {shift}")
        uneven = [count + rank for rank in range(n)]
        mine = memory(n * (count + comm.rank) + sum(uneven))
        want, x = np.empty(sum(uneven), mine.dtype), mine[: n * (count + comm.rank)]
        splits = [count + comm.rank] * n
        comm.all_to_all(want, x.copy(), uneven, splits)
        comm.all_to_all(mine[1 : 1 + sum(uneven)], x, uneven, splits)
        np.testing.assert_array_equal(mine[1 : 1 + sum(uneven)], want)

    run_world(n, run, transport=transport)


@pytest.mark.parametrize(("shape", "dtype", "words"), [(3, "O", "dtype is object"), ((2, -1), "f4", "negative")])
def test_memory_that_could_not_take_part_is_not_made(run_world: Any, shape: Any, dtype: str, words: str) -> None:
    def run(comm: Communicator) -> None:
        with pytest.raises(UsageError, match=words):
            comm.empty(shape, dtype)
        assert comm.empty(np.int64(3)).shape == (3,)

    run_world(2, run, transport="shared")


def test_a_tensor_can_be_resized_after_it_took_part() -> None:
    """Tensor.numpy() would forbid it for ever: FSDP frees its shards so."""
    torch = pytest.importorskip("torch")
    x = torch.ones(5)
    assert as_buffer(x, "x", written=True).flat.tolist() == [1.0] * 5
    x.untyped_storage().resize_(0)
    assert x.untyped_storage().nbytes() == 0


def test_a_buffer_keeps_its_tensor() -> None:
    torch = pytest.importorskip("torch")
    buffer = as_buffer(torch.arange(1000.0), "x", written=False)
    others = [torch.full((1000,), -1.0) for _ in range(10)]  # would lie where the tensor was
    assert buffer.flat[-1] == 999
    assert len(others) == 10
