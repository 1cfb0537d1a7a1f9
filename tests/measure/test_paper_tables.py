"""The paper's tables and Figure 3, as far as they can be counted."""

import pytest
from support import assert_user_error

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.measure.paper import TABLE_8
from mmseg_inceptionnext.measure.paper_tables import CONVOLUTIONS, convolution_cost, paper_table, plot_figure_3


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line[1:-1].split('|')] for line in table.splitlines()[2:]]


@pytest.mark.parametrize('k', [3, 7, 11, 31])
def test_convolutions_cost_what_table_2_says(k):
    c, pixels = 96, 56 * 56
    weights = {'conventional': k**2 * c**2, 'depthwise': k**2 * c, 'Inception': (2 * k + 9) * c // 8}
    for name, make in CONVOLUTIONS.items():
        assert convolution_cost(make(k)) == (weights[name], 2 * weights[name] * pixels)


def test_ours_stands_beside_the_print():
    rows = cells(paper_table(8))
    assert [row[1] for row in rows] == [row.model for row in TABLE_8]
    assert all(row[3] == row[4] and row[5] == row[6] for row in rows)
    assert rows[1][3:] == ['28.0', '28.0', '4.2', '4.2', '947', '3093', '81.9']


def test_the_configs_have_the_stochastic_depth_of_table_10():
    assert all(ours == printed for _, ours, printed in cells(paper_table(10)))


@pytest.mark.parametrize('number', [2, 3, 5])
def test_every_small_table_is_made(number):
    assert len(cells(paper_table(number))) in (4, 6)


def test_the_configs_have_the_recipes_of_table_9():
    pytest.importorskip('mmpretrain')
    rows = cells(paper_table(9))
    assert len(rows) == 22 and all(row[1::2] == row[2::2] for row in rows)


def test_a_table_that_the_paper_does_not_have():
    with pytest.raises(UserError, match='table=11 is not in the paper: it has Tables 1 to 10'):
        paper_table(11)


def test_figure_3_is_drawn(tool_here, tmp_path):
    process = tool_here('paper', '--figure', '3', '--out', tmp_path / 'figure.png')
    assert process.returncode == 0 and (tmp_path / 'figure.png').stat().st_size > 10000
    with pytest.raises(UserError, match='figure.xyz'):
        plot_figure_3(tmp_path / 'figure.xyz', largest=5)
    assert_user_error(tool_here('paper', '--table', '10', '--out', tmp_path / 'x.png'), '--out is for --figure')
