"""Tables of texts: columns stand below each other, numbers flush right, and nothing that was said is lost."""

from hypothesis import given
from hypothesis import strategies as st

from specdec_lab.bench.tables import aligned, github

WORD = st.text("abc xyz,.0123456789", max_size=7).map(str.strip)


@st.composite
def tables(draw):
    columns = draw(st.integers(1, 5))
    return draw(st.lists(st.lists(WORD, min_size=columns, max_size=columns), min_size=1, max_size=6))


@given(tables(), st.sets(st.integers(0, 4)))
def test_every_text_stands_in_its_own_column_on_its_own_side(rows, numbers):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row, line in zip(rows, aligned(rows, numbers), strict=True):
        assert line == line.rstrip()
        line, start = line.ljust(sum(widths) + 2 * len(widths)), 0
        for i, width in enumerate(widths):
            cell = line[start : start + width]
            assert cell.strip() == row[i]
            assert not row[i] or (cell.endswith(row[i]) if i in numbers else cell.startswith(row[i]))
            start += width + 2


def test_a_github_table_has_one_rule_under_its_head_that_names_the_numbers():
    lines = github([["peer", "tokens/s"], ["ours", "1,200"], ["theirs", "900"]], numbers=[1])
    assert lines == ["| peer | tokens/s |", "| --- | --: |", "| ours | 1,200 |", "| theirs | 900 |"]
