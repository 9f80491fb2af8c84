"""Every command that a page shows is one that its program takes, and every link leads somewhere."""

import re
from itertools import pairwise

import pytest

from algorithms import registry
from cluster.configuration.trees import presets
from cluster.grid import expand
from tests import measures_page
from tests.benchmarks import layers, results
from tests.documented_commands import ROOT, commands, take, text_of
from tuning.study import load_plan

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("docs/*.ipynb"),
        ROOT / "ray_configs/README.md",
        *ROOT.glob("tests/**/*.md"),
    ]
)


def name_of(page):
    return str(page.relative_to(ROOT))


# A changelog also speaks of commands that are gone, and of options alone.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_every_command_parses(page):
    for words in commands(page):
        try:
            take(words)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{name_of(page)}: {' '.join(words)}: {error}") from error


def test_the_pages_show_commands_of_every_kind():
    seen = {tuple(words[:2]) for page in PAGES for words in commands(page)}
    for command in (
        "run",
        "tune",
        "compare",
        "resume",
        "describe",
        "ui",
        "bench",
        "status",
        "attach",
        "stop",
    ):
        assert ("sparsyfed", command) in seen
    assert {("ray", "submit"), ("ray", "job"), ("ray", "up"), ("ray", "down"), ("python", "-m")} <= seen
    assert {"kubectl", "sbatch", "pip"} <= {first for first, *_ in seen}


@pytest.mark.parametrize(
    "line",
    [
        "sparsyfed run quickstart local.lrr=0.1",
        "sparsyfed run compare-digits method=nobody",
        "sparsyfed run --outptu x",
        "sparsyfed describe sparsifed",
        "sparsyfed describe partition ldaa",
        "sparsyfed tune study-digits study.trails=3",
        "sparsyfed tune study-nothing",
        "sparsyfed bench rounds",
        "sparsyfed resum",
        "sparsyfed resume runs/mine local.lr=1",
        "python -m tests.benchmarks.growth --quik",
        "python -m tests.benchmarks.absent",
        "python -m cluster run rounds=none",
        "ray job submitt",
        "ray up ray_configs/absent.yaml",
        "conda install sparsyfed",
    ],
)
def test_a_wrong_command_is_found(line, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n\n```bash\n{line}   # a comment\n```\n")
    (words,) = commands(page)
    with pytest.raises((Exception, SystemExit)):
        take(words)


def test_commands_are_found_wherever_a_page_has_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "As `sparsyfed run a=1\nb=2` does, `sparsyfed-0.9-s0` and `sparsyfed 95 %` are none.\n\n"
        "    sparsyfed describe x   # shows\n    rounds: 3\n\n"
        "```yaml\nsparsyfed run none\n```\n\n"
        "```bash\nA=1 sparsyfed ui \\\n    --port 1 && pytest\n```\n"
    )
    assert sorted(commands(page)) == sorted(
        [
            ["sparsyfed", "run", "a=1", "b=2"],
            ["sparsyfed", "describe", "x"],
            ["sparsyfed", "ui", "--port", "1"],
            ["pytest"],
        ]
    )


def test_the_partition_that_is_shown_is_the_one_that_is_tested():
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/experiments.md").read_text(), re.DOTALL)
    assert (ROOT / "tests/example_partition.py").read_text().endswith(f'"""\n\n{shown}')


def test_the_way_from_a_paper_is_the_one_that_is_tested(tmp_path):
    """Method, test and study file of the page; ``tests/test_example_fedsparsify.py`` is run."""
    text = (ROOT / "docs/from-paper-to-comparison.md").read_text()
    method, test = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert method == (ROOT / "tests/example_fedsparsify.py").read_text()
    own = "tests.example_fedsparsify"
    assert test == (ROOT / "tests/test_example_fedsparsify.py").read_text().replace(own, "fedsparsify")
    (study,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_study.yaml").write_text(study.replace("fedsparsify:", f"{own}:"))
    plan = load_plan(tmp_path / "my_study.yaml")
    assert [*plan.contenders] == ["topk", "sparsyfed", "FedSparsify"]
    assert [*plan.contenders["FedSparsify"].default] == ["algorithm.until", "algorithm.exponent", "local.lr"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith(("#", "mailto:")):
            continue
        assert (page.parent / target.partition("#")[0]).exists(), f"{name_of(page)}: {target}"


def test_the_table_of_contents_leads_to_every_page():
    text = (ROOT / "docs/index.md").read_text()
    linked = {(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)(?:#\S*)?\)", text)}
    own = {page for page in PAGES if page.parent.name == "docs"}
    assert own - linked == {ROOT / "docs/index.md"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_and_lists_are_drawn(page):
    """Rows as long as their table's head, and a blank line before a list, which the site wants."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    cells = 0
    for before, line in pairwise(["", *text.splitlines()]):
        if line.startswith("|"):
            found = len(re.sub(r"`[^`]*`|\\\|", "", line).strip("|").split("|"))
            cells = found if not before.startswith("|") else cells
            assert found == cells, line
        elif re.match(r"- |\d+\. ", line):
            assert not before or re.match(r" *- |\d+\. |  ", before), line


def test_the_table_of_presets_says_how_many_runs_each_has():
    rows = re.findall(r"^\| (`paper-.*?) \| (\d+)", (ROOT / "docs/experiments.md").read_text(), re.MULTILINE)
    told = {}
    for names, count in rows:
        first, *more = re.findall(r"`([^`]+)`", names)
        for name in (first, *(first + one if one.startswith("-") else one for one in more)):
            told[name] = int(count)
    assert told.keys() == {name for name in presets() if name.startswith("paper-")}
    for name, count in told.items():
        grid = expand(name)
        assert (1 if grid is None else len(grid.runs)) == count, name


@pytest.mark.parametrize("file", sorted(ROOT.glob("docs/results/*.csv")), ids=name_of)
def test_kept_rows_make_tables(file):
    if file.stem.endswith("-layers"):
        assert all(0 <= sparsity <= 100 for *_, sparsity in layers.read(file))
        return
    rows = results.read(file)
    assert all(row.config and row.code for row in rows)
    assert results.tables(rows).count("| method |") >= 1


def test_the_page_of_measures_is_that_of_the_table():
    """``python -m tests.measures_page`` writes it."""
    assert measures_page.PAGE.read_text(encoding="utf-8") == measures_page.page()


@pytest.mark.parametrize("name", sorted(registry()))
def test_every_method_is_listed_and_has_its_paragraph(name):
    assert f"`{name}`" in (ROOT / "README.md").read_text()
    assert f"**`{name}`**" in (ROOT / "docs" / "methods.md").read_text()


def test_every_file_of_rows_is_spoken_of():
    text = (ROOT / "docs" / "results.md").read_text()
    rows = sorted((ROOT / "docs" / "results").glob("*.csv"))
    assert [file.name for file in rows if file.name not in text] == []
