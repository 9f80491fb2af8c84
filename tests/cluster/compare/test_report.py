"""What a comparison leaves: one page with nothing outside it, and its parts as files."""

import csv
import re
import struct
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats

from cluster.compare import plots
from cluster.compare.curves import mean_curve, metric
from cluster.compare.formats import METHOD_NOTE, latex, markdown, number_rows
from cluster.compare.groups import group_runs
from cluster.compare.reading import read_folders
from cluster.compare.report import write
from cluster.compare.table import Comparison, Table
from tests.cluster.compare.made import made, write_run

#: What two methods of two seeds, with everything measured but simulated time, are drawn as.
DRAWN = {
    "accuracy-rounds", "accuracy-mb-up", "accuracy-mb-down", "accuracy-mb-total", "accuracy-flops",
    "sparsity-rounds", "regrowth-rounds", "consensus-rounds", "sparsity-layers", "accuracy-sparsity",
    "mb-to-accuracy", "clients",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that a comparison of two methods, an unfinished run among theirs, is written as."""
    runs = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        sparse = write_run(runs / f"s{seed}", [0.3, 0.5, 0.7 + seed / 100], f"seed={seed}")
        (sparse / "clients.csv").write_text("client,samples,accuracy\n0,10,0.5\n1,10,0.9\n")
        write_run(
            runs / f"f{seed}",
            [0.4, 0.6, 0.8],
            f"seed={seed}",
            "algorithm.name=fedavg",
            **{"sparsity/global": 0.0},
        )
    write_run(runs / "<broken> & late", [0.1], "seed=2", rounds=3)
    written = tmp_path_factory.mktemp("written")
    comparison = Comparison.of(read_folders([runs]), "runs of a test", target=0.5)
    assert write(comparison, written) == written / "report.html"
    return written


class References(HTMLParser):
    """Collects what a page refers to, and checks that its tags are balanced."""

    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [
            value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")
        ]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_refers_to_nothing_outside(folder):
    text = (folder / "report.html").read_text()
    page = References()
    page.feed(text)
    assert not page.open
    assert len(page.found) == len(DRAWN)
    assert all(each.startswith("data:image/png;base64,") for each in page.found)
    assert not re.search(r"https?:|//|url\(|@import|<script|<link", re.sub(r"base64,[^\"]*", "", text))


def test_the_page_says_what_is_compared_and_what_is_not(folder):
    text = (folder / "report.html").read_text()
    assert "<title>Comparison, digits, lda 0.5</title>" in text
    assert "runs of a test: 4 runs in 2 groups, 1 left out" in text
    assert "&lt;broken&gt; &amp; late" in text
    assert "ended after round 1 of 3" in text
    assert "Not drawn, for no run has the data: test accuracy against simulated time" in text


def test_every_plot_is_a_png_and_a_pdf(folder):
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert names == {path.stem for path in (folder / "figures").glob("*.pdf")} == DRAWN
    for path in (folder / "figures").glob("*.png"):
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width == 816  # 3.4 inches of 240 dots
        assert height > 500
    pdf = (folder / "figures" / "clients.pdf").read_bytes()
    assert b"/Type /Font" in pdf
    assert b"/Type3" not in pdf  # journals refuse such fonts


def test_tables_and_curves_hold_the_numbers(folder):
    with open(folder / "table.csv", newline="") as file:
        cells = {(row["group"], row["figure"]): row for row in csv.DictReader(file)}
    assert float(cells["sparsyfed", "accuracy"]["mean"]) == pytest.approx(70.5)
    # Half of the interval: t_1(.975) s / sqrt 2 = 12.7062 * .5
    assert float(cells["sparsyfed", "accuracy"]["high"]) == pytest.approx(70.5 + 6.3531, abs=1e-3)
    with open(folder / "runs.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    assert [run["left_out"] for run in runs] == ["", "", "", "", "ended after round 1 of 3"]
    with open(folder / "curves.csv", newline="") as file:
        points = {(row["group"], row["metric"], row["round"]): row for row in csv.DictReader(file)}
    assert float(points["sparsyfed", "test/accuracy", "2"]["mean"]) == 0.5
    assert float(points["fedavg", "masks/regrowth_share", "3"]["mean"]) == 0.003


def test_a_comparison_written_again_leaves_no_older_picture(tmp_path):
    comparison = Comparison.of([made(0.5)], "one run")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "clients.png").write_bytes(b"old")
    write(comparison, tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "accuracy-rounds.png",
        "accuracy-rounds.pdf",
    }


def small_table():
    runs = [made(value, seed=seed, algorithm__name=name)
            for name, values in {"a_b": [0.5, 0.51, 0.52], "c": [0.4, 0.4, 0.4]}.items()
            for seed, value in enumerate(values)]  # fmt: skip
    return Table.of(group_runs(runs).groups)


def test_latex_is_escaped_and_marks_the_best():
    lines = latex(small_table()).splitlines()
    assert lines[1:6] == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"group & seeds & accuracy (\%) & best (\%) \\",
        r"\midrule",
        r"a\_b & 3 & \textbf{51.0 $\pm$ 2.5} & 51.0 $\pm$ 2.5 \\",  # 4.3027 / sqrt 3
    ]
    assert lines[6] == r"c & 3 & 40.0$\downarrow$ & 40.0 \\"


def test_markdown_explains_its_marks():
    lines = markdown(small_table()).splitlines()
    assert lines[2] == r"| a_b | 3 | 51.0 ± 2.5 \* | 51.0 ± 2.5 |"
    assert lines[5:7] == [r"\* the best: all it competes with are worse  ", "↓ worse than the best  "]
    assert lines[7].startswith("Accuracy: 2 groups over the 3 seeds in common. A difference of 3 points")
    assert lines[-1] == METHOD_NOTE


def test_csv_holds_the_verdicts():
    header, *rows = number_rows(small_table())
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    assert [cell["verdict"] for cell in cells] == ["best", "", "worse", ""]
    assert cells[0]["adjusted_p"] == 1.0
    assert cells[2]["adjusted_p"] == pytest.approx(stats.ttest_1samp([10, 11, 12], 0).pvalue)
    runs = [made(value, seed=seed, algorithm__name=name)
            for name, values in {"a": [0.5, 0.6], "b": [0.6, 0.4]}.items()
            for seed, value in enumerate(values)]  # fmt: skip
    _, first, *_ = number_rows(Table.of(group_runs(runs).groups))
    assert first[7] == "not distinguishable"


def test_a_mean_curve_is_over_the_rounds_that_every_seed_measured(tmp_path):
    for seed, accuracies in enumerate(([0.1, 0.2, 0.3], [0.3, None, 0.5])):
        write_run(tmp_path / str(seed), accuracies, f"seed={seed}")
    (group,) = group_runs(read_folders([tmp_path])).groups
    rounds, mean, low, high = mean_curve(group, metric("test/accuracy", 100.0))
    np.testing.assert_array_equal(rounds, [1, 3])
    np.testing.assert_allclose(mean, [20, 40])
    np.testing.assert_allclose(high - mean, 12.7062 * 10, rtol=1e-5)  # t_1(.975) s / sqrt 2, s = 10 sqrt 2
    np.testing.assert_allclose(mean - low, high - mean)


def test_styles_are_all_different_and_a_method_keeps_its_colour():
    runs = [made(0.5, algorithm__name=name, algorithm__sparsity=sparsity)
            for name in ("topk", "flash", "zerofl") for sparsity in (0.9, 0.95, 0.99)]  # fmt: skip
    groups = group_runs(runs).groups
    styles = plots.styles_of(groups)
    assert len({(style["color"], str(style["linestyle"])) for style in styles}) == 9
    assert (
        len({style["color"] for group, style in zip(groups, styles, strict=True) if group.method == "topk"})
        == 1
    )
    single = plots.styles_of(group_runs([made(0.5, local__lr=lr) for lr in range(14)]).groups)
    assert len({(style["color"], str(style["linestyle"])) for style in single}) == 14


def test_of_many_groups_the_best_are_drawn_in_their_order():
    groups = group_runs([made(number / 40, local__lr=number) for number in range(40)]).groups
    assert [group.label for group in plots.best_of(groups)] == [f"lr {number}" for number in range(26, 40)]


def test_a_thousand_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "figures", lambda groups: iter(()))  # they are of a few groups, however many
    first = write_run(tmp_path / "runs" / "0", [0.5, 0.6], "seed=0", "local.lr=0.5")
    config, lines = ((first / name).read_text() for name in ("config.yaml", "rounds.jsonl"))
    for number in range(1, 1000):
        path = tmp_path / "runs" / str(number)
        path.mkdir()
        lr, seed = 0.5 + number // 5, number % 5
        own = config.replace("seed: 0\n", f"seed: {seed}\n", 1).replace("lr: 0.5\n", f"lr: {lr}\n")
        (path / "config.yaml").write_text(own)
        (path / "rounds.jsonl").write_text(lines.replace("0.6", f"{0.4 + number / 2000:.4f}"))
    comparison = Comparison.of(read_folders([tmp_path / "runs"]), "a thousand runs")
    assert len(comparison.table.groups) == 200
    assert all(len(group.runs) == 5 for group in comparison.table.groups)
    assert comparison.table.groups[-1].label == "lr 199.5"
    text = write(comparison, tmp_path / "out").read_text()
    assert "1000 runs in 200 groups" in text
    assert f"Of the 200 groups the {plots.MOST_LINES} best are drawn" in text
