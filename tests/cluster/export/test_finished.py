"""What can be exported: a run that has ended and trained a whole model."""

import json
import re

import pytest

import cluster
from cluster.cli import main
from cluster.configuration.foreign import ForeignCodeError
from cluster.export import hub
from cluster.export.finished import ExportError, Finished
from cluster.records.run_folder import RunFolder
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_run_that_has_not_ended_is_not_exported(cache, tmp_path):
    config = tiny_federation(cache)
    RunFolder.create(tmp_path / "new", config)
    with pytest.raises(ExportError, match=r"new is not finished: 0 of 2 rounds; sparsyfed resume .*new"):
        Finished.open(tmp_path / "new")
    cluster.run(config, tmp_path / "half", should_stop=lambda: True)
    with pytest.raises(ExportError, match=r"half is not finished: 1 of 2 rounds; sparsyfed resume .*half"):
        Finished.open(tmp_path / "half")
    cluster.resume(tmp_path / "half")
    assert Finished.open(tmp_path / "half").line["round"] == 2


def test_a_run_that_was_to_stop_there_has_ended(cache, tmp_path):
    run = cluster.run(tiny_federation(cache, stop_after=1), tmp_path / "run")
    assert Finished.open(run.folder).line["round"] == 1


def copied(finished, folder):
    """The run's files in a folder of its own."""
    folder.mkdir()
    for path in finished.folder.path.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_run_that_went_on_beyond_its_result_is_not_exported(finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    with open(run / "rounds.jsonl", "a") as file:
        file.write(json.dumps({**finished.line, "round": 3}) + "\n")
    with pytest.raises(ExportError, match=r"run: its result is of round 2, rounds.jsonl ends with round 3; "):
        Finished.open(run)


def test_a_model_without_its_result_is_not_exported(finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    (run / "result.json").unlink()
    with pytest.raises(ExportError, match=r"run is not finished: 2 of 2 rounds without result.json; sparsyf"):
        Finished.open(run)


def test_a_result_of_before_there_was_stop_is_exported(finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    summary = json.loads((run / "result.json").read_text())
    del summary["stopped_by"]
    (run / "result.json").write_text(json.dumps(summary))
    hub.write(Finished.open(run), tmp_path / "out")
    assert "Of the whole model, after 2 of 2 rounds:" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_is_not_exported(cache, tmp_path):
    model = {"name": "mlp", "hidden": [8]}
    config = tiny_federation(cache, model=model, adapter={"name": "lora"}, rounds=1)
    run = cluster.run(config, tmp_path / "run")
    assert "sparsyfed export" not in (run.folder / "README.md").read_text()
    with pytest.raises(ExportError, match=r"trained an adapter \(adapter.name = lora\) on a base"):
        Finished.open(run.folder)


def test_code_of_somebody_elses_folder_is_run_on_request_alone(cache, tmp_path):
    run = cluster.run(tiny_federation(cache, rounds=1), tmp_path / "run")
    (run.folder / ".config.yaml.here").unlink()
    with pytest.raises(ForeignCodeError, match=r"data.name = tests.*: sparsyfed export \S*run --trust"):
        Finished.open(run.folder)
    assert Finished.open(run.folder, trust=True).line["round"] == 1


def test_the_command_makes_a_folder_in_the_runs(finished, capsys):
    run = finished.folder.path
    assert main(["export", str(run), "--to", "hub"]) == 0
    assert re.search(r"folder +\S*run/hub\nupload +hf upload OWNER/NAME", capsys.readouterr().out)
    assert (run / "hub" / "config.json").is_file()
    assert main(["export", str(run), "--to", "hub"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "hub exists and is not empty; choose another --output" in error


def test_what_the_command_says_can_be_typed(finished, tmp_path, capsys):
    output = tmp_path / ("a long name [bold]" + 80 * "x")
    assert main(["export", str(finished.folder.path), "--to", "hub", "--output", str(output)]) == 0
    assert f"upload    hf upload OWNER/NAME '{output}'\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["absent", "--to", "hub"], "holds no run: config.yaml is missing"),
        (["absent"], "--to"),
        (["absent", "--to", "tflite"], "invalid choice: 'tflite'"),
    ],
)
def test_a_wrong_command_is_a_line(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["export", *words])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert says in capsys.readouterr().err
