"""Rows of runs, and the tables drawn from them, with numbers worked by hand."""

import json

import pytest

from tests.benchmarks import results
from tests.cluster.compare.made import write_run

HEAD = (
    "preset,method,seed,width,round,accuracy,sparsity,mb_up,mb_down,"
    "gflop_dense,gflop_sparse,client_cut,regrowth,config,code\n"
)
#: Seeds 0, 1, 2 of one method: accuracies 40, 41, 42, so 41 +- t_2(.975) 1/sqrt(3) = 4.303 * 0.57735 = 2.484.
THREE = HEAD + "".join(
    f"laptop,sparsyfed,{seed},8,20,{40 + seed},95,10.5,14.9,1476,418.6,1234.5,0,c{seed},abc\n"
    for seed in (0, 1, 2)
)


def file_of(tmp_path, text):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    return path


def finished_run(folder, *overrides, **more):
    """Three rounds; round n has regrowth n, 4 n cut, 2 MB up, 3 MB down, 1 GFLOP sparse and 5 dense."""
    write_run(folder, [0.1, None, 0.3], *overrides, **{"flops/dense_total": 5e9, **more})
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"masks/regrowth": line["round"], "masks/client_cut": 4.0 * line["round"]}
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "result.json").write_text(
        json.dumps({"complete": True, "config_hash": "c0", "code_hash": "abc"})
    )
    return folder


def test_a_cell_is_the_mean_and_half_of_its_interval(tmp_path):
    lines = results.tables(results.read(file_of(tmp_path, THREE))).splitlines()
    assert lines[0] == "`laptop`, width 8, round 20, seeds 0, 1, 2; code abc:"
    names = "accuracy %", "sparsity %", "MB up", "MB down", "GFLOP dense", "GFLOP sparse"
    assert lines[2] == f"| method | {' | '.join(names)} | client cut | regrowth |"
    assert lines[3] == "|---|" + "---:|" * 8
    assert lines[4] == "| sparsyfed | 41.0 ± 2.5 | 95.0 | 10.5 | 14.9 | 1,476 | 419 | 1,234 | 0 |"
    assert len(lines) == 5


def test_language_models_have_columns_of_their_own(tmp_path):
    text = HEAD.strip() + ",perplexity,bits\n"
    text += "text,fedavg,0,,30,,0,9,9,80,80,,,c9,def,5.25,2.3923\n"
    rows = results.read(file_of(tmp_path, text))
    assert results.as_csv(rows) == text
    printed = results.tables(rows).splitlines()
    assert printed[2].startswith("| method | perplexity | bits | sparsity % |")
    assert printed[4] == "| fedavg | 5.25 | 2.392 | 0.0 | 9.0 | 9.0 | 80 | 80 |"


def test_errors_have_a_column_and_what_is_small_keeps_two_digits(tmp_path):
    text = HEAD.strip() + ",rmse\n"
    for seed, error in enumerate((50, 52, 54)):
        text += f"table,fedavg,{seed},,30,,0,0.0456,0.0517,0.031,0.0314,,,c9,def,{error}\n"
    rows = results.read(file_of(tmp_path, text))
    assert results.as_csv(rows) == text
    printed = results.tables(rows).splitlines()
    assert printed[4] == "| fedavg | 52.00 ± 4.97 | 0.0 | 0.046 | 0.052 | 0.031 | 0.031 |"


def test_robustness_has_two_columns(tmp_path):
    text = (
        HEAD.strip() + ",robust,robust_gap\n" + "digits,fixed_mask,0,,30,90,95,1,1,1,1,,,c9,def,61.25,4.5\n"
    )
    rows = results.read(file_of(tmp_path, text))
    assert results.as_csv(rows) == text
    head, _, line = results.tables(rows).splitlines()[2:]
    assert head.startswith("| method | accuracy % | robust % | gap | sparsity % |")
    assert line.startswith("| fixed_mask | 90.0 | 61.2 | 4.5 | 95.0 |")


def test_one_seed_has_no_interval_and_a_missing_seed_is_told(tmp_path):
    text = THREE + "laptop,topk,1,8,20,17.44,94.8,10,15,1476,1400,,,c9,def\n"
    last = results.tables(results.read(file_of(tmp_path, text))).splitlines()[-1]
    assert last == "| topk (1 of 3 seeds) | 17.4 | 94.8 | 10.0 | 15.0 | 1,476 | 1,400 |  |  |"


def test_widths_and_rounds_are_tables_of_their_own_and_empty_columns_are_left_out(tmp_path):
    text = HEAD
    for width, number in ((8, 20), (16, 20), (16, 40), ("", 40)):
        text += f"laptop,fedavg,0,{width},{number},50,0,1,1,1,1,,,c,abc\n"
    printed = results.tables(results.read(file_of(tmp_path, text)))
    heads = [line for line in printed.splitlines() if line.startswith("`")]
    assert heads == [
        "`laptop`, width 8, round 20, seed 0; code abc:",
        "`laptop`, width 16, round 20, seed 0; code abc:",
        "`laptop`, width 16, round 40, seed 0; code abc:",
        "`laptop`, round 40, seed 0; code abc:",
    ]
    assert "client cut" not in printed


def test_rows_are_collected_from_run_folders(tmp_path, capsys):
    finished_run(tmp_path / "grid" / "a", "seed=1")
    finished_run(tmp_path / "grid" / "b", "model.name=resnet18", "model.width=8")
    write_run(tmp_path / "grid" / "unfinished", [0.1])
    rows = results.rows_of([tmp_path / "grid"], rounds=[2, 3, 7])
    told = capsys.readouterr().err
    assert "unfinished is not finished" in told
    assert "a has no round 7" in told
    assert [(row.width, row.round, row.seed, row.preset, row.method) for row in rows] == [
        (None, 2, 1, "grid", "sparsyfed"),
        (None, 3, 1, "grid", "sparsyfed"),
        (8, 2, 0, "grid", "sparsyfed"),
        (8, 3, 0, "grid", "sparsyfed"),
    ]
    second, third = rows[:2]
    assert (second.accuracy, third.accuracy) == (None, 30.0)
    assert (third.sparsity, third.mb_up, third.mb_down) == (50.0, 6.0, 9.0)
    assert (third.gflop_dense, third.gflop_sparse) == (5.0, 3.0)
    # Means from round 2 on: of 2; of 2 and 3.
    assert (second.regrowth, third.regrowth, third.client_cut) == (2.0, 2.5, 10.0)
    assert (third.config, third.code) == ("c0", "abc")


def test_rows_come_back_from_their_file(tmp_path):
    finished_run(tmp_path / "grid" / "a")
    rows = results.rows_of([tmp_path / "grid"], preset="mine", label="topk, lr 0.1")
    assert (rows[0].preset, rows[0].method) == ("mine", "topk, lr 0.1")
    assert results.read(file_of(tmp_path, results.as_csv(rows))) == rows


def test_a_file_that_holds_no_rows_is_one_line(tmp_path, capsys):
    wrong = {
        "a,b\n1,2\n": "the first line has to be preset,method,",
        THREE.replace(",40,", ",forty,"): "rows.csv, line 2: could not convert string to float: 'forty'",
    }
    for text, message in wrong.items():
        assert results.main([str(file_of(tmp_path, text))]) == 2
        assert message in capsys.readouterr().err
    assert results.main([str(tmp_path / "absent.csv")]) == 2
    with pytest.raises(SystemExit, match="2"):
        results.main([])


def test_few_tables_show_more(tmp_path):
    folder = finished_run(tmp_path / "grid" / "a")
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"comm/dense_bytes": 4e6 * line["round"], "masks/consensus": 0.25 * line["round"]}
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = results.rows_of([folder], more=["up_bits", "consensus", "memory_mb"])
    # 6 MB of the 24 MB that dense float32 models take; rounds 2 and 3 alone.
    assert (row.up_bits, row.consensus) == (8.0, 0.625)
    # The quickstart: w, theta, w_t and the gradient of 625,782 weights, SparsyFed's step, and a batch.
    assert row.memory_mb == pytest.approx(3.8, abs=0.05)
    assert results.read(file_of(tmp_path, results.as_csv([row])))[0].up_bits == 8.0
