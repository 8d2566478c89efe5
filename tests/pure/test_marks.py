from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fleet.notebook.marks import Marks, end_mark

OUT = (0, "stdout")
PARTS = st.sampled_from([b"text\n", b"\0", b"\0end of", b"\0end of cell x\n", end_mark(1), b"7\n", b""])


@given(st.lists(PARTS), st.lists(PARTS), st.integers(1, 7))
def test_the_pieces_in_which_output_comes_make_no_difference(
    before: list[bytes], after: list[bytes], size: int
) -> None:
    data = b"".join([*before, end_mark(12), *after])
    whole, pieces = Marks(12, 1), Marks(12, 1)
    shown = whole.take(OUT, data) + whole.rest().get(OUT, b"")
    cut = b"".join(pieces.take(OUT, data[at : at + size]) for at in range(0, len(data), size))
    assert cut + pieces.rest().get(OUT, b"") == shown
    assert whole.missing == pieces.missing == {(0, "stderr")}
    assert shown == b"".join(part for part in [*before, *after] if part != end_mark(1))


def test_a_mark_of_an_earlier_cell_is_not_shown_and_is_not_the_end() -> None:
    marks = Marks(12, 1)
    assert marks.take(OUT, b"late" + end_mark(11) + b"now" + end_mark(1)) == b"latenow"
    assert len(marks.missing) == 2
