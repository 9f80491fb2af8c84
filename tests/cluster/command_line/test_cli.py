"""What a user types, sees and is left with: every command, every mistake, in folders of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cluster
from cluster import execution
from cluster.cli import main
from cluster.command_line.arguments import parse

#: Under a second a round: in this process, 1,210 weights.
SMALL = [
    "execution=inline",
    "rounds=2",
    "cohort=2",
    "partition.clients=6",
    "local.epochs=1",
    "model.name=mlp",
    "model.hidden=[16]",
    "tracking.enabled=false",
]
CHECKPOINT = "checkpoints/round-000001.safetensors"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stopped_run(folder: str = "half") -> Path:
    assert main(["run", *SMALL, "stop_after=1", "--output", folder]) == 0
    return Path(folder)


# ----------------------------------------------------------------------------------------- run and resume


def test_run_shows_its_rounds_and_leaves_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *SMALL, "--output", "mine"]) == 0
    shown = capsys.readouterr().out
    assert {p.name for p in Path("mine").iterdir()} == {
        "config.yaml", ".config.yaml.here", "rounds.jsonl", "result.json", "model.safetensors", "checkpoints",
        "partition.png", "curves.png", "devices.png", "sparsity_per_layer.csv", "flops_per_layer.csv",
        "README.md",
    }  # fmt: skip
    lines = [json.loads(line) for line in Path("mine/rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    for text in ("sparsyfed, seed 0: 2 of 2 rounds", "round 1/2", "round 2/2", "over 6 clients", "folder"):
        assert text in shown
    assert f"{100 * lines[-1]['test/accuracy']:.1f}% final" in shown
    assert "sparsyfed resume" not in shown


def test_run_without_output_makes_its_folder_in_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", *SMALL, "rounds=1", "algorithm.name=topk"]) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("digits-lda0.5-topk-s0-")
    assert str(folder) in capsys.readouterr().out


def test_words_may_stand_in_any_order_around_an_option() -> None:
    for line in (
        "run rounds=1 quickstart --output mine seed=2",
        "run --output mine quickstart rounds=1 seed=2",
        "run quickstart rounds=1 seed=2 --output=mine",
    ):
        arguments = parse(line.split())
        assert (arguments.source, arguments.output) == ("quickstart", "mine")
        assert arguments.overrides == ["rounds=1", "seed=2"]
    assert parse(["run", "rounds=1"]).source is None


def test_a_stopped_run_says_how_to_go_on_and_ends_as_if_never_stopped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", *SMALL, "--output", "whole"]) == 0
    stopped_run()
    assert "sparsyfed resume half stop_after=null" in capsys.readouterr().out
    assert main(["resume", "half", "stop_after=null"]) == 0
    shown = capsys.readouterr().out
    assert "resuming after round 1" in shown
    assert "2 of 2 rounds" in shown
    assert Path("half/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_ctrl_c_ends_the_run_after_the_round_and_exits_130() -> None:
    command = [sys.executable, "-m", "cluster", "run", *SMALL, "rounds=5000", "--output", "long"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round "):
            break
    process.send_signal(signal.SIGINT)
    shown, complaints = process.communicate(timeout=60)
    assert process.returncode == 130, complaints
    assert "stopping after this round" in complaints
    assert "sparsyfed resume long" in shown
    assert json.loads(Path("long/result.json").read_text())["complete"] is False


def test_ctrl_c_before_the_first_round_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: cluster.Config) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "_preflight", interrupted)
    assert main(["run", *SMALL, "--output", "mine"]) == 130
    assert list(Path().iterdir()) == []


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["algoritm.beta=1.3"], ["algoritm", "did you mean algorithm?"]),
        (["local.epoch=2"], ["local.epoch", "did you mean local.epochs?"]),
        (["algorithm.betta=1.3"], ["algorithm.betta", "did you mean beta?"]),
        (["algorithm.name=sparsifed"], ["sparsifed", "did you mean sparsyfed?"]),
        (["rounds=many"], ["rounds", "valid integer", "'many'"]),
        (["algorithm.activation_pruning=7"], ["activation_pruning", "expected bool, found 7"]),
        (["algorithm.sparsity=1.5"], ["algorithm.sparsity: 1.5 is out of range; allowed: 0.0 to 0.9999"]),
        (["cohort=7"], ["cohort: 7", "partition.clients is 6"]),
        (["data.name=mine", "data.path=nowhere"], ["data.path = '", "nowhere' is no folder"]),
        (["partition.clients=2000"], ["partition.clients = 2000", "1437 training samples"]),
        (["model.name=small_cn"], ["small_cn", "did you mean small_cnn?"]),
        (["tracking.enabled=true", "tracking.uri=http://127.0.0.1:1"], ["http://127.0.0.1:1", "not answer"]),
        (["execution=ray", "address=127.0.0.1:1"], ["address", "'127.0.0.1:1'", "ray start --head"]),
        (["quikstart"], ["quikstart: neither a file nor a preset; presets: "]),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *SMALL, *words, "--output", "mine"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert complaint.count("error: ") == 1
    assert "Traceback" not in complaint
    for text in expected:
        assert text in complaint
    assert list(Path().iterdir()) == []


def test_a_wrong_column_is_named_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    Path("data").mkdir()
    image = {"bytes": b"", "path": ""}
    for split in ("train", "test"):
        pq.write_table(pa.table({"picture": [image], "digit": [3]}), f"data/{split}.parquet")
    words = ["data.name=mine", "data.path=data", "data.label_column=label", "data.cache=cache"]
    assert main(["run", *SMALL, *words, "--output", "mine"]) == 2
    complaint = capsys.readouterr().err
    assert "data.label_column" in complaint
    assert "digit" in complaint
    assert not Path("mine").exists()


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_touched(
    damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped_run()
    data = bytearray((folder / CHECKPOINT).read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    else:
        del data[len(data) // 2 :]
    (folder / CHECKPOINT).write_bytes(data)
    before = contents(folder)
    assert main(["resume", "half"]) == 2
    complaint = capsys.readouterr().err
    assert f"{CHECKPOINT}: damaged checkpoint" in complaint
    assert "Traceback" not in complaint
    assert contents(folder) == before


def test_what_would_change_the_result_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    folder = stopped_run()
    before = contents(folder)
    assert main(["resume", "half", "seed=3", "actors=1"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: seed: would change the result")
    assert contents(folder) == before


def test_a_server_that_is_not_ray_is_refused_soon(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert main(["run", *SMALL, "execution=ray", f"address={address}", "--output", "mine"]) == 2
    assert f"no Ray cluster answers at '{address}' (something else listens" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_a_taken_folder_and_a_folder_without_a_run_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").mkdir()
    Path("taken/letter.txt").write_text("mine")
    assert main(["run", *SMALL, "--output", "taken"]) == 2
    assert "taken exists and is not empty" in capsys.readouterr().err
    assert main(["resume", "taken"]) == 2
    assert "taken holds no run" in capsys.readouterr().err
    assert main(["sync", "taken"]) == 2
    assert "taken holds no tracking.json" in capsys.readouterr().err
    assert main(["ui", "--root", "taken"]) == 2
    assert "there is no store yet at" in capsys.readouterr().err
    assert contents(Path("taken")) == {"letter.txt": b"mine"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "--rounds", "5"], "no option --rounds; keys of an experiment are written rounds=VALUE"),
        (["run", "quickstart", "other"], "quickstart and other are two experiments"),
        (["resume", "half", "5"], "'5' is one argument too many"),
        (["sync", "a", "b"], "one argument too many: b"),
        (["fly"], "invalid choice: 'fly'"),
        (["describe", "topk", "rounds=5"], "topk is no experiment"),
    ],
)
def test_wrong_arguments_say_what_is_right(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert expected in complaint


# ------------------------------------------------------------------------------------------------ failures


def test_a_run_that_diverges_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *SMALL, "rounds=5", "local.lr=1e30", "--output", "wild"]) == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: every update was refused in 3 rounds in a row")
    assert "Traceback" not in complaint
    assert len(Path("wild/rounds.jsonl").read_text().splitlines()) == 3


def test_a_failing_client_is_named_and_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.py").write_text(
        "from dataclasses import dataclass\n"
        "from algorithms import Algorithm, Client\n"
        "class BrokenClient(Client):\n"
        "    def begin(self):\n"
        "        raise ZeroDivisionError('no samples today')\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Broken(Algorithm):\n"
        "    client = BrokenClient\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["run", *SMALL, "algorithm.name=broken:Broken", "--output", "mine"]) == 1
    complaint = capsys.readouterr().err
    assert "failed in round 1, stage train: ZeroDivisionError: no samples today" in complaint
    assert not Path("mine").exists()


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(config: cluster.Config) -> None:
        raise ArithmeticError("a bug")

    monkeypatch.setattr(execution, "_preflight", unexpected)
    with pytest.raises(ArithmeticError, match="a bug"):
        main(["run", *SMALL])


# ---------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["run", "resume", "sync", "ui", "describe"])
def test_help_gives_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.split("examples:")[1].count(f"sparsyfed {command}") >= 2


def test_run_help_lists_what_is_declared(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    assert "  topk             Dense training, then one global cut to the top K" in text
    assert "  quickstart              The main job" in text
    assert " local.lr=0.1 " in text
    assert "learning rate of round 1" in text
    assert "float32, float16, bfloat16, int8" in text
    assert "  shards           All samples, sorted by label" in text
    assert " partition.clients=100 " in text
    assert " devices.tiers.<name>.share=" in text
    assert " devices.tiers.<name>.availability.name=always" in text


def test_help_version_and_wrong_arguments_import_nothing_heavy() -> None:
    script = """
import sys
from cluster.cli import main
for words in (["--help"], ["--version"], ["resume", "--help"], ["sync", "--help"], ["ui", "--help"],
              ["run", "--rounds"], ["run", "a", "b"], []):
    try:
        main(words)
    except SystemExit:
        pass
    else:
        raise AssertionError(words)
print(sorted({"torch", "ray", "mlflow", "numpy", "rich"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert f"sparsyfed {cluster.__version__}" in done.stdout


def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m cluster describe sparsyfed | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout == "sparsyfed\n"
    assert done.stderr == ""
