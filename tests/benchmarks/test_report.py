"""Repetitions and the comparison with a stored run, on figures that are made up."""

import json
import sys

import pytest

from tests.benchmarks import __main__ as bench
from tests.benchmarks.report import Figure, comparison, repeated, write


def figure(value, case="small", metric="round ms"):
    return Figure("round", case, metric, value, target=9.0)


def stored(tmp_path, figures):
    path = tmp_path / "then.json"
    write(figures, path)
    return path


def lines_of(text):
    """The comparison's cells by case, without the lines around them."""
    return {line.split()[1]: line.split()[4:] for line in text.splitlines() if line.startswith("round:")}


def test_repetitions_become_their_median_lowest_and_highest():
    runs = [figure(5.0), figure(1.0, "large"), figure(3.0), figure(2.0, "large"), figure(9.0)]
    assert repeated(runs) == [
        Figure("round", "small", "round ms", 5.0, 9.0, (3.0, 9.0)),
        Figure("round", "large", "round ms", 1.5, 9.0, (1.0, 2.0)),
    ]


def test_what_was_measured_once_has_no_noise():
    assert repeated([figure(5.0)]) == [figure(5.0)]
    assert figure(5.0).span is None


def test_only_ratios_beyond_the_noise_of_both_sides_are_marked(tmp_path):
    then = {"slower": (10, 11, 12), "faster": (10, 11, 12), "touches": (10, 11, 12), "noisy": (10, 11, 12)}
    now = {"slower": (14, 13, 15), "faster": (9, 8, 7), "touches": (12, 20, 30), "noisy": (9, 40, 50)}
    path = stored(tmp_path, repeated([figure(value, case) for case in then for value in then[case]]))
    text = comparison(repeated([figure(value, case) for case in now for value in now[case]]), path)
    assert lines_of(text) == {
        # 2 / 11 and 2 / 14; 2 / 8; 18 / 20; 41 / 40
        "slower": ["11", "18%", "14", "14%", "1.27", "*"],
        "faster": ["11", "18%", "8", "25%", "0.73", "*"],
        "touches": ["11", "18%", "20", "90%", "1.82"],
        "noisy": ["11", "18%", "40", "102%", "3.64"],
    }
    assert text.splitlines()[-1].startswith("* beyond the noise")


@pytest.mark.parametrize(("then", "now"), [((10,), (20, 21)), ((10, 11), (20,)), ((10,), (20,))])
def test_nothing_is_marked_where_a_side_was_measured_once(tmp_path, then, now):
    path = stored(tmp_path, repeated([figure(value) for value in then]))
    text = comparison(repeated([figure(value) for value in now]), path)
    assert "*" not in lines_of(text)["small"]
    assert "--repeat 3" in text.splitlines()[-1]


def test_runs_stored_before_there_were_repetitions_are_read(tmp_path):
    path = stored(tmp_path, [figure(10.0), figure(7.0, "gone")])
    content = json.loads(path.read_text())
    for fields in content["figures"]:
        del fields["span"]
    path.write_text(json.dumps(content))
    text = comparison([figure(5.0), figure(1.0, "new")], path)
    assert lines_of(text) == {"small": ["10", "5", "0.50"]}


def test_a_command_repeats_everything_and_stores_the_noise(tmp_path, monkeypatch, capsys):
    values = iter((4.0, 40.0, 6.0, 60.0, 5.0, 50.0))
    asked = []

    class Made:
        @staticmethod
        def figures(name, quick):
            asked.append(name)
            return [Figure(name, "small", "round ms", next(values))]

    path = tmp_path / "now.json"
    monkeypatch.setattr(sys, "argv", ["bench", "round", "wire", "--repeat", "3", "--output", str(path)])
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: Made)
    assert bench.main() == 0
    assert asked == ["round", "wire"] * 3
    found = [(f["benchmark"], f["value"], f["span"]) for f in json.loads(path.read_text())["figures"]]
    assert found == [("round", 5.0, [4.0, 6.0]), ("wire", 50.0, [40.0, 60.0])]
    assert "repetition 3 of 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["round", "--repeat", "0"], "--repeat 0: expected a number from 1\n"),
        (["nothing"], "no benchmark nothing; there are round, "),
        (["gpu", "--repeat", "2"], "sparsyfed bench gpu runs alone"),
    ],
)
def test_wrong_commands_are_refused(words, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    assert bench.main() == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")
