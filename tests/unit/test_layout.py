"""The layout of the segment."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmpool import layout
from shmpool.layout import TABLES, Layout, Table

# These change only together with layout.FORMAT, that is with a major release (before the first release: whenever
# layout.py changes).  In a patch or minor release a change would part old and new workers of one pool.
GOLDEN_FORMAT = 1
GOLDEN_DIGEST = 0xF7DDEED5BF12238E
GOLDEN_PLACES = "63c78433c928cd2e"

LAYOUTS = st.builds(Layout, st.integers(1, 200), st.integers(1, 64), st.integers(1, 256), st.integers(1, 256))


def test_format_and_digest_are_the_golden_ones() -> None:
    """The format never changes by accident."""
    assert (layout.FORMAT, layout.DIGEST) == (GOLDEN_FORMAT, GOLDEN_DIGEST)


def test_places_are_the_golden_ones() -> None:
    """The carving of a default segment never changes by accident (the digest does not cover the code)."""
    shape = Layout(workers=128, slots_per_worker=32, endpoints=16, groups=32)
    places = [shape.span(table) for table in TABLES] + [shape.config_area(i) for i in range(layout.CONFIG_AREAS)]
    assert hashlib.sha256(repr(places).encode()).hexdigest()[:16] == GOLDEN_PLACES


@given(LAYOUTS)
def test_tables_do_not_overlap_and_fit(shape: Layout) -> None:
    """Tables lie one behind the other, each on pages of its own; the configuration areas end the segment."""
    end = 0
    for table in TABLES:
        start, behind = shape.span(table)
        assert start >= end
        assert start * layout.WORD_BYTES % layout.PAGE_BYTES == 0
        assert behind - start == shape.rows(table) * table.row_words
        end = behind
    byte = end * layout.WORD_BYTES
    for area in range(layout.CONFIG_AREAS):
        start, behind = shape.config_area(area)
        assert start >= byte
        assert start % layout.PAGE_BYTES == 0
        assert behind - start == layout.CONFIG_AREA_BYTES
        byte = behind
    assert byte == shape.size_bytes
    assert shape.size_bytes % layout.PAGE_BYTES == 0


@given(LAYOUTS, st.data())
def test_cells_lie_inside_their_table(shape: Layout, data: st.DataObject) -> None:
    """A cell is inside its row; a row that does not exist is an error."""
    table = data.draw(st.sampled_from(TABLES))
    row = data.draw(st.integers(0, shape.rows(table) - 1))
    column = data.draw(st.sampled_from(table.columns))
    start, end = shape.span(table)
    at = shape.at(table, row, column.name)
    assert start + row * table.row_words <= at < start + (row + 1) * table.row_words <= end
    with pytest.raises(IndexError, match=table.name):
        shape.at(table, shape.rows(table))
    with pytest.raises(IndexError):
        shape.at(table, -1)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_rows_do_not_share_cache_lines(table: Table) -> None:
    """A row is one word of a dense array, or whole cache lines; its columns' names are unique."""
    row_bytes = table.row_words * layout.WORD_BYTES
    assert table.row_words == 1 or row_bytes % 64 == 0
    names = [column.name for column in table.columns]
    assert len(set(names)) == len(names)


def test_what_is_read_first_never_moves() -> None:
    """Magic, format, digest, size and dimensions are found without knowing the layout."""
    names = [column.name for column in layout.HEADER.columns[:8]]
    assert names == [
        "magic",
        "format",
        "digest",
        "size_bytes",
        "workers",
        "slots_per_worker",
        "endpoints",
        "groups",
    ]
    assert list(layout.DIMENSIONS_AT) == [4, 5, 6, 7]
    assert (layout.MAGIC_AT, layout.FORMAT_AT, layout.DIGEST_AT, layout.SIZE_AT) == (0, 1, 2, 3)


def test_unknown_columns_are_errors() -> None:
    """A misspelt column is not taken for another one."""
    with pytest.raises(KeyError, match="has no column"):
        layout.HEADER.column("magick")
