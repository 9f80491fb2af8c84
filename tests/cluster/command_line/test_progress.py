"""What a run shows while it works, on a terminal and elsewhere, from lines made by hand."""

import io

import pytest
from rich.console import Console

import cluster
from cluster.command_line.figures import amount, duration, fitting
from cluster.command_line.progress import RunDisplay, emptied, final_text, refusals
from cluster.measures import as_values
from cluster.workload.objectives import Regression


def line(number: int, seconds: float = 4.0, accuracy: float | None = 0.5) -> dict[str, object]:
    """A round's line as the display reads it: 1 MB up and 2 MB down a round."""
    return {
        "round": number, "test/accuracy": accuracy, "train/loss": 1.0, "sparsity/global": 0.9,
        "comm/uplink_bytes": 1e6, "comm/downlink_bytes": 2e6, "comm/uplink_bytes_total": number * 1e6,
        "comm/downlink_bytes_total": number * 2e6, "time/round_s": seconds, "time/simulated_s": number * 10.0,
    }  # fmt: skip


def test_remaining_time_counts_the_round_that_is_already_computed() -> None:
    display = RunDisplay(Console(file=io.StringIO()), cluster.resolve(None, ["rounds=10"]))
    assert display.remaining_s() is None
    display.on_line(line(1, seconds=2.0))
    display.on_line(line(2, seconds=4.0))
    # Round 2's line came with round 3 computed: 7 rounds of (2 + 4) / 2 s.
    assert display.remaining_s() == pytest.approx(21.0, abs=0.1)
    # A round that is not evaluated has its line at once: 7 rounds of (2 + 4 + 6) / 3 s.
    display.on_line(line(3, seconds=6.0, accuracy=None))
    assert display.remaining_s() == pytest.approx(28.0, abs=0.1)


def test_a_long_run_prints_sparingly_and_always_its_last_line() -> None:
    shown = io.StringIO()
    with RunDisplay(Console(file=shown), cluster.resolve(None, ["rounds=500"])) as display:
        for number in range(1, 321):  # in far less than 2 s
            display.on_line(line(number))
    rounds = [text for text in shown.getvalue().splitlines() if text.startswith("round")]
    assert [text.split()[1] for text in rounds] == ["1/500", "320/500"]
    assert "up 320 MB  down 640 MB  simulated 53:20" in rounds[-1]


def test_a_terminal_gets_a_status_line_and_the_last_rounds() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80, color_system=None)
    display = RunDisplay(console, cluster.resolve(None, ["rounds=40"]))
    console.print(display._picture())
    assert "computing round 1" in shown.getvalue()
    for number in range(1, 13):
        display.on_line(line(number))
    console.file = shown = io.StringIO()
    console.print(display._picture())
    text = shown.getvalue()
    assert "round 12/40" in text
    assert "acc 50.0% sparse 90.0% up 12.0 down 24.0 MB" in text
    # 40 - 12 - 1 rounds of 4 s.
    assert "eta 1:48" in text
    assert text.count("90.0%") == 7  # six rounds and the status line
    assert max(map(len, text.splitlines())) <= 80


def test_what_private_models_tell_stands_in_every_line() -> None:
    dp = ["sampler.name=poisson", "privacy.dp.clip=1", "privacy.dp.noise_multiplier=1", "algorithm.name=topk"]
    config, told = cluster.resolve(None, ["rounds=40", *dp]), {"privacy/epsilon": 7.9729}
    plain, terminal = io.StringIO(), io.StringIO()
    with RunDisplay(Console(file=plain), config) as display:
        display.on_line(line(1) | told)
    assert "MB  epsilon 7.97  simulated" in plain.getvalue()
    console = Console(file=terminal, force_terminal=True, width=80, color_system=None)
    display = RunDisplay(console, config)
    display.on_line(line(1) | told)
    console.print(display._picture())
    assert terminal.getvalue().count("7.97") == 2  # its column, and the status line
    assert max(map(len, terminal.getvalue().splitlines())) <= 80


def refusing(number, *refused):
    return line(number) | {"clients/refused_list": [list(each) for each in refused]}


def test_refused_updates_are_said_with_their_reason() -> None:
    assert refusals([line(1), refusing(2)]) == ""
    assert refusals([refusing(1, (7, "not finite"))]) == "1 update refused: not finite (client 7)"
    more = refusing(2, (7, "not finite"), (3, "too far\nby a trace"))
    assert refusals([refusing(1, (7, "not finite")), more]) == "3 updates refused: not finite (clients 3, 7)"
    many = refusing(1, *((client, "far\ntrace") for client in range(9)))
    assert refusals([many]) == "9 updates refused: far (clients 0, 1, 2, 3, 4, ...)"


def test_refused_updates_show_while_a_run_works() -> None:
    shown = io.StringIO()
    with RunDisplay(Console(file=shown), cluster.resolve(None, ["rounds=500"])) as display:
        for number in range(1, 4):  # only the first and the last of these are printed
            display.on_line(refusing(number, (number, "not finite")) if number < 3 else line(number))
    printed = [text.partition("  1 update")[2] for text in shown.getvalue().splitlines()]
    assert printed == ["", " refused: not finite (client 1)", " refused: not finite (client 2)"]
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    display = RunDisplay(terminal, cluster.resolve(None, ["rounds=40"]))
    display.on_line(refusing(1, (7, "not finite " * 20)))
    terminal.print(display._picture())
    text = terminal.file.getvalue()
    assert "1 update refused: not finite" in text
    assert max(map(len, text.splitlines())) <= 80


def test_layers_that_a_cut_has_emptied_are_named() -> None:
    assert emptied([0.2, 0.99]) == ""
    assert emptied([0.2, 0.9, 1.0]).startswith("warning: prunable layer 3 of 3 has no weight left")


def test_durations_are_written_as_clocks_show_them() -> None:
    assert [duration(s) for s in (None, 0.4, 65, 7201)] == ["-", "0:00", "1:05", "2:00:01"]


def test_amounts_take_the_prefix_that_fits() -> None:
    shown = [amount(v, "B") for v in (0, 999, 1000, 12.4e6, 999_999_999, 1e9, 2.5e21)]
    assert shown == ["0.00 B", "999.00 B", "1.00 kB", "12.40 MB", "1000.00 MB", "1.00 GB", "2500.00 EB"]


def test_what_selects_is_shown_by_its_own_name_and_unit() -> None:
    shown = io.StringIO()
    keys = ["data.name=diabetes", "objective.name=regression", "partition.name=iid", "rounds=2"]
    with RunDisplay(Console(file=shown), cluster.resolve(None, keys)) as display:
        own = {key: value for key, value in line(1).items() if key != "test/accuracy"}
        display.on_line({**own, "test/rmse": 61.257})
    assert "round 1/2  RMSE  61.26  loss 1.000" in shown.getvalue()
    summary = {"rmse": 61.257, "objective": {"name": "regression", "metrics": as_values(Regression.measures)}}
    assert final_text(summary) == "RMSE 61.26"
    assert final_text({"accuracy": None, "val_accuracy": 0.5}) == "validation accuracy 50.0%"


@pytest.mark.parametrize("width", [32, 40, 60, 80, 120])
def test_a_narrow_terminal_has_fewer_columns_and_none_that_is_cut(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    display = RunDisplay(console, cluster.resolve(None, ["rounds=40"]))
    for number in range(1, 13):
        display.on_line(line(number))
    console.file = shown = io.StringIO()
    console.print(display._picture())
    text = shown.getvalue()
    assert "…" not in text
    assert all(len(row) <= width for row in text.splitlines())
    assert "round 12/40" in text
    assert "acc 50.0%" in text
    assert ("down MB" in text) == (width >= 60)
    assert ("eta" in text) == (width >= 40)


def test_columns_that_fit_are_kept_in_their_order_the_most_wanted_first() -> None:
    assert fitting([5, 5, 5, 5], (3, 1, 0, 2), 16) == [0, 1, 3]
    assert fitting([5, 9, 5], (0, 1, 2), 12) == [0]  # what follows is wanted less
    assert fitting([50], (0, 1), 12) == [0]
