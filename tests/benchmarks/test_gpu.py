"""The GPU's turn, rehearsed on the CPU: it keeps its time, survives failures, goes on where it ended."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.benchmarks.__main__ import main
from tests.benchmarks.authors_curves import AUTHORS_CURVES
from tests.benchmarks.gpu import paper, report, speed
from tests.benchmarks.gpu.worker import Item, Outcome, Worker
from tests.cluster.workload.parquet_folders import ROOT, encoded, pictures, write_dataset, write_split


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten classes of small colour images, the training split in three files."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, shape=(16, 16, 3), train=0, test=60)
    (folder / "train-00000-of-00001.parquet").unlink()
    for shard in range(3):
        images = [encoded(one) for one in pictures(400, (16, 16, 3), seed=shard)]
        write_split(folder / "shard", "train", images, [row % 10 for row in range(400)])
        (folder / "shard" / "train-00000-of-00001.parquet").rename(folder / f"train-{shard}.parquet")
    labels = [row % 10 for row in range(60)]
    write_split(folder, "test", [encoded(one) for one in pictures(60, (16, 16, 3))], labels)
    return folder


def turn(*words):
    """A turn where only the packages of the slim inline path are installed."""
    command = [
        sys.executable,
        "-m",
        "tests.slim",
        "tests.benchmarks",
        "gpu",
        "--device",
        "cpu",
        *map(str, words),
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results_of(runs):
    return json.loads((runs / "rehearsal.json").read_text())


def test_a_rehearsal_does_every_part_within_its_minutes(data, tmp_path):
    parts, ended = ("checks", "speed", "paper"), []
    for minutes in (0.7, 1, 2, 4):  # one turn does it; on a busy machine the same command goes on
        process = turn("--minutes", minutes, "--data", data, "--resume", tmp_path)
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, out + err
        results = results_of(tmp_path)["results"]
        ended = [{r["state"] for r in results.values() if r["part"] == part} for part in parts]
        assert not any("failed" in states for states in ended), out + err
        if all("done" in states for states in ended):
            break
    assert all("done" in states for states in ended), out
    assert results[report.key_of_run("sparsyfed")]["found"]["rounds"] > 0
    page = (tmp_path / "rehearsal.md").read_text()
    for heading in ("Aims", "Checks", "Speed", "The paper's experiment", "Left out"):
        assert f"\n## {heading}\n" in page
    assert "needs CUDA" in page or "the time of its part was over" in page


def test_a_signal_ends_it_with_what_was_found(tmp_path):
    process = turn("--minutes", 5, "--resume", tmp_path)
    while not (tmp_path / "rehearsal.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    found = results_of(tmp_path)
    assert found["results"]["device"]["state"] == "done"
    assert found["turns"][0]["ended"].endswith("by SIGTERM")
    assert "stopped by a signal" in {r["why"].removesuffix(" before") for r in found["results"].values()}
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running()]


# -------------------------------------------------------------------------------------- one item at a time


def item(function):
    return Item(function, "checks", f"tests.benchmarks.odd_items:{function}")


@pytest.fixture
def worker():
    made = Worker("cpu", stopped=lambda: False)
    yield made
    made.close()


def later(seconds):
    return time.monotonic() + seconds


def test_what_fails_or_crashes_harms_nothing_after_it(worker):
    first = worker.run(item("answers"), later(60), print).found["pid"]
    assert worker.run(item("answers"), later(60), print).found["pid"] == first
    outcome = worker.run(item("falls"), later(60), print)
    assert (outcome.state, outcome.why) == ("failed", "ValueError: planted")
    outcome = worker.run(item("crashes"), later(60), print)
    assert (outcome.state, outcome.why) == ("failed", "the process ended with status 7")
    assert worker.run(item("answers"), later(60), print).found["pid"] != first


def test_what_hangs_is_killed_with_its_children_when_its_time_is_over(worker):
    worker.run(item("answers"), later(60), print)
    outcome = worker.run(item("hangs"), later(3), print)
    assert (outcome.state, outcome.why) == ("cut short", "its time was over")
    child = outcome.found["child"]
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)


def test_a_signal_ends_a_run_after_its_round_and_the_next_turn_goes_on(data, tmp_path):
    came = []
    worker = Worker("cpu", stopped=lambda: bool(came))
    settings = {method: {"precision": "float32", "graphs": False} for method in report.METHODS}
    run = paper.items(tmp_path, data, settings)[0]
    outcome = worker.run(run, later(300), came.append)
    assert outcome.state == "done", outcome
    rounds = outcome.found["rounds"]
    assert 0 < rounds < outcome.found["of"]
    # Elsewhere the data lies at another path.
    moved = tmp_path / "moved"
    moved.symlink_to(data)
    came.clear()
    outcome = worker.run(paper.items(tmp_path, moved, settings)[0], later(300), came.append)
    assert outcome.state == "done", outcome
    assert outcome.found["rounds"] > rounds
    # Other data does not go on: the labels of train and test changed places.
    other = tmp_path / "other"
    other.mkdir()
    for file in data.glob("*.parquet"):
        swapped = "test" if file.name.startswith("train") else "train"
        (other / f"{swapped}{file.name.removeprefix('train').removeprefix('test')}").symlink_to(file)
    came.clear()
    outcome = worker.run(paper.items(tmp_path, other, settings)[0], later(300), came.append)
    worker.close()
    assert outcome.state == "failed"
    assert "holds runs on other data" in outcome.why


# ------------------------------------------------------------------------------------------------- the page


def result(part="speed", **found):
    return {"part": part, "state": "done", "why": "", "found": found, "turn": 0}


def test_aims_follow_from_what_was_measured():
    case, hosts = speed.key_of, speed.hosts_key
    results = {
        case(speed.RESNET, "fedavg", "float32", True): result(**{"steps/s": 900.0}),
        case(speed.RESNET, "fedavg", "tf32", True): result(**{"steps/s": 5000.0}),
        case(speed.RESNET, "sparsyfed", "float32", True): result(**{"steps/s": 750.0}),
        hosts(speed.RESNET, "fedavg", 4): result(**{"steps/s": 1600.0}),
        hosts(speed.RESNET, "sparsyfed", 1): result(**{"steps/s": 700.0}),
        case(speed.PFL, "fedavg", "float32", True): result(**{"steps/s": 7500.0}),
        report.key_of_run("sparsyfed"): result(**{"seconds a round": 0.3}),
    }
    shown = {what: measured for what, measured, _ in report.aims(results)}
    assert shown["ResNet-18, batch 16, float32, fedavg: steps/s in total"] == "1,600 (4 host processes)"
    assert shown["ResNet-18, batch 16, float32, sparsyfed: steps/s in total"] == "750 (1 host process)"
    assert shown["SparsyFed's step over dense, ResNet-18, graphs"] == "1.20"
    assert shown["SparsyFed's step over dense, ResNet-18, launched"] == "not measured yet"
    assert shown["pfl-research's benchmark: 375,000 steps of batch 10, training alone"].startswith("50 s")
    assert shown["700 rounds of paper-cifar10, sparsyfed"] == "3.5 min"
    assert shown["700 rounds of paper-cifar10, topk"] == "not measured yet"
    assert paper.fastest(results, "fedavg") == {"precision": "tf32", "graphs": True}
    assert paper.fastest(results, "topk") == {"precision": "float32", "graphs": True}


def test_a_result_is_kept_until_a_better_one_and_measured_again_on_another_device(tmp_path):
    path = tmp_path / "gpu.json"
    first = report.Book(path, {"device": "one", "torch": "2", "code": "a"})
    first.put("case", "speed", Outcome("done", found={"steps/s": 1.0}))
    second = report.Book(path, {"device": "one", "torch": "2", "code": "a"})
    assert second.done("case")
    second.put("case", "speed", Outcome("left out", "no time"))
    assert second.results["case"]["found"] == {"steps/s": 1.0}
    assert "Found by earlier code" not in path.with_suffix(".md").read_text()
    changed = report.Book(path, {"device": "one", "torch": "2", "code": "b"})
    assert not changed.done("case")
    changed.write()
    assert "## Found by earlier code\n\n1: case" in path.with_suffix(".md").read_text()
    changed.put("case", "speed", Outcome("failed", "it does not hold"))
    assert changed.results["case"]["state"] == "failed"
    other = report.Book(path, {"torch": "2", "code": "b"})
    other.on("other")
    assert not other.done("case")
    assert other.results == {}
    other.write()
    assert [kept["key"] for kept in json.loads(path.read_text())["elsewhere"]] == ["case"]


def test_the_picture_shows_runs_beside_the_authors(tmp_path):
    book = report.Book(tmp_path / "gpu.json", {"device": "one"})
    run = {"accuracy": [[10, 0.2], [20, 0.4]], "rounds": 20, "of": 700, "sparsity": 0.94}
    run |= {"model": "resnet18", "precision": "tf32", "graphs": True}
    book.put(report.key_of_run("topk"), "paper", Outcome("done", found=run))
    # The authors' figures of rounds 10 to 20 are the one of round 20: 16.1 %.
    assert "| topk | 20 of 700 | 30.0 | 16.1 | 94.0 |  | resnet18, tf32, graphs |" in report.page(
        book.turns, book.results
    )
    book.put(
        speed.key_of(speed.RESNET, "topk", "tf32", True), "speed", Outcome("done", found={"steps/s": 9.0})
    )
    assert report.draw(book.path).read_bytes().startswith(b"\x89PNG")
    assert {"fedavg", "sparsyfed", "topk", "zerofl"} == set(AUTHORS_CURVES)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("gpu round", "runs alone"),
        ("--minutes 3", "runs alone"),
        ("gpu --quick", "runs alone"),
        ("gpu --device cpu --minutes 0", "--minutes 0: expected a number above 0"),
        ("gpu --draw nowhere.json", "--draw nowhere.json: no such file"),
        ("gpu --device cpu --data nowhere", "'nowhere' is no folder"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_starts(words, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", *words.split()])
    assert main() == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
