"""The laptop's picture: a panel a width, means over seeds, the authors' curves as far as the runs go."""

import pytest

from tests.benchmarks import laptop
from tests.benchmarks.test_results import HEAD


def row(method, seed, width, number, accuracy):
    return f"laptop,{method},{seed},{width},{number},{accuracy},95,1,1,1,1,,,c,abc\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        HEAD
        + "".join(
            row("topk", seed, 8, 10, 10 + seed) + row("topk", seed, 8, 20, 30 + seed) for seed in (0, 2)
        )
        + row("fedavg", 0, 16, 40, 50)
        + row("fedavg", 0, 16, 30, "")
        + row("topk with one wide layer", 0, 16, 40, 20)
    )
    return path


def test_a_panel_a_width_with_means_and_the_authors_curves(file, tmp_path):
    figure = laptop.draw(laptop.read(file), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    narrow, wide = figure.axes
    assert (narrow.get_title(), wide.get_title()) == ("width 8, 2 seeds", "width 16, 1 seed")

    def drawn(panel, method):
        lines = [line for line in panel.lines if line.get_color() == laptop._COLOUR[method]]
        return [line.get_xydata().tolist() for line in lines]

    points, means, authors = drawn(narrow, "topk")
    assert sorted(points) == [[10, 10], [10, 12], [20, 30], [20, 32]]
    assert means == [[10, 11], [20, 31]]
    assert authors == [[5, 9.0], [10, 9.3], [15, 12.8], [20, 16.4]]
    assert drawn(wide, "fedavg")[:2] == [[[40, 50]], [[40, 50]]]
    assert drawn(narrow, "flash") == []


def test_a_file_that_holds_no_rows_is_one_line(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("a,b\n")
    assert laptop.main([str(tmp_path / "rows.csv")]) == 2
    assert "the first line has to be" in capsys.readouterr().err
