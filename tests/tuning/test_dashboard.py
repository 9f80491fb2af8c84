"""What Optuna's dashboard shows is read back by Optuna's calls: names, notes, pictures, links to MLflow."""

import json
from pathlib import Path

import optuna
import pytest
from mlflow.tracking import MlflowClient
from optuna.artifacts import FileSystemArtifactStore, download_artifact, get_all_artifact_meta

from tests.tuning.studies import finish, tiny_plan
from tuning import dashboard
from tuning.folder import StudyFolder
from tuning.search import Search, present
from tuning.storage import JOURNAL, open_database, open_journal

STUDY = {"methods": ["fedavg"], "trials": 2, "final_seeds": 1}
STUDY |= {"shared": {"local.lr": {"low": 0.1, "high": 1e30}}}


def note_of(study, trial=None):
    """As optuna-dashboard 0.21 puts it together; its own ``get_note`` where that is installed."""
    key = "dashboard:" if trial is None else f"dashboard:{trial._trial_id}:"
    attributes = study._storage.get_study_system_attrs(study._study_id)
    assert attributes[f"{key}note_ver"] == 1
    pieces = [value for name, value in attributes.items() if name.startswith(f"{key}note_str:")]
    text = "".join(attributes[f"{key}note_str:{place}"] for place in range(len(pieces)))
    try:
        from optuna_dashboard._note import get_note_from_system_attrs
    except ImportError:
        return text
    assert get_note_from_system_attrs(attributes, trial and trial._trial_id) == {"version": 1, "body": text}
    return text


@pytest.fixture(scope="module", params=["journal", "sqlite"])
def shown(request, cache, tmp_path_factory):
    """A study with a finished and a diverged trial, the curves drawn: folder, Optuna study, result."""
    root = tmp_path_factory.mktemp("shown")
    url = None if request.param == "journal" else f"sqlite:///{root}/trials.db"
    study = STUDY | {"sampler": {"name": "random"}, "storage": url}
    # In MLflow's store the first one only: a new store takes seconds.
    plan = tiny_plan(cache, study, tracking={"enabled": url is None, "experiment": "x"})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("picture", "population"):
            patch.setattr(f"cluster.records.outputs.{name}", lambda *_, **__: None)
        result = finish(plan, root / "study")["fedavg"]
    storage = open_journal(root / "study") if url is None else open_database(url)
    return root / "study", optuna.load_study(study_name="tiny/fedavg", storage=storage), result


def test_what_selects_has_its_name(shown):
    _, study, _ = shown
    assert study.metric_names == ["val_accuracy"]


def test_two_objectives_have_two_names(tmp_path):
    plan = tiny_plan(tmp_path, {"methods": ["zerofl"], "objectives": ["accuracy", "uplink_bytes"]})
    Search(plan, plan.contenders["zerofl"], open_journal(tmp_path), "mark")
    study = optuna.load_study(study_name="tiny/zerofl", storage=open_journal(tmp_path))
    assert study.metric_names == ["val_accuracy", "uplink_bytes"]


def test_a_study_says_what_it_is_and_what_came_out(shown):
    folder, study, result = shown
    note = note_of(study)
    assert "2 trials of 3 rounds of 4 clients, judged by validation accuracy" in note
    assert f"sparsyfed tune --report {folder}" in note
    if (folder / "tracking.json").exists():
        run = json.loads((folder / "tracking.json").read_text())["run_id"]
        assert f"[MLflow run `{run}` of experiment x](http://127.0.0.1:5000/#/runs/{run})" in note
        assert f"while `sparsyfed ui --store {folder.parent}/mlflow.db` serves it" in note
    (accuracy,) = (summary["accuracy"] for summary in result.finals.values())
    assert study.user_attrs["test_accuracy"] == f"{accuracy:.6g}"  # one seed has no interval


def test_every_trial_has_its_note_and_leads_to_mlflow(shown):
    folder, study, result = shown
    store = folder.parent / "mlflow.db"
    client = MlflowClient(f"sqlite:///{store}") if store.exists() else None
    for trial, tried in zip(study.trials, result.tried, strict=True):
        note = note_of(study, trial)
        if client is not None:
            run = client.get_run(trial.user_attrs["mlflow_run_id"])
            assert run.info.run_name == f"fedavg-trial-{trial.number:03d}"
            assert trial.user_attrs["mlflow_uri"] == f"sqlite:///{store}"
            assert f"/#/runs/{run.info.run_id})" in note
        assert f"run folder `fedavg/trial-{trial.number:03d}`" in note
        if tried.state == "finished":
            assert f"finished: validation accuracy {100 * trial.value:.1f}%" in note
        else:
            assert "failed: every update was refused in 3 rounds in a row" in note
    assert {tried.state for tried in result.tried} == {"finished", "failed"}


def test_every_finished_trial_has_its_picture(shown, tmp_path):
    folder, study, _ = shown
    store = FileSystemArtifactStore(folder / "artifacts")
    for trial in study.trials:
        found = get_all_artifact_meta(trial, storage=study._storage)
        picture = folder / "fedavg" / f"trial-{trial.number:03d}" / "curves.png"
        assert [(each.filename, each.mimetype) for each in found] == [
            ("curves.png", "image/png")
        ] * picture.exists()
        if found:
            copy = tmp_path / f"{trial.number}.png"
            download_artifact(artifact_store=store, artifact_id=found[0].artifact_id, file_path=str(copy))
            assert copy.read_bytes() == picture.read_bytes()
    assert len(list((folder / "artifacts").iterdir())) == 1


def test_a_trial_presented_again_keeps_one_note_and_one_picture(tmp_path):
    """As after a kill between the picture and the end of the trial, or in the midst of the picture."""
    plan = tiny_plan(tmp_path, {"methods": ["zerofl"]})
    search = Search(plan, plan.contenders["zerofl"], open_journal(tmp_path), "mark")
    trial, run = search.ask(), tmp_path / "zerofl" / "trial-000"
    run.mkdir(parents=True)
    (run / "curves.png").write_bytes(b"picture")
    present(trial, "zerofl", run, tmp_path / "artifacts", "finished")
    (picture,) = (tmp_path / "artifacts").iterdir()
    picture.unlink()
    present(trial, "zerofl", run, tmp_path / "artifacts", "finished again")
    assert [path.read_bytes() for path in (tmp_path / "artifacts").iterdir()] == [b"picture"]
    assert len(get_all_artifact_meta(trial, storage=trial.storage)) == 1
    note = note_of(trial.study, trial)
    assert "trial 0** finished\n" in note
    assert "MLflow" not in note  # it was not tracked


def test_a_note_that_somebody_edited_stays(tmp_path):
    plan = tiny_plan(tmp_path, {"methods": ["zerofl"]})
    search = Search(plan, plan.contenders["zerofl"], open_journal(tmp_path), "mark")
    study = optuna.load_study(study_name="tiny/zerofl", storage=open_journal(tmp_path))
    search.introduce(tmp_path)
    before = note_of(study)
    study._storage.set_study_system_attr(study._study_id, "dashboard:note_str:0", "mine")
    search.introduce(tmp_path)
    assert note_of(study) == "mine" != before


def test_a_long_note_is_kept_in_pieces(tmp_path):
    study = optuna.create_study(storage=open_journal(tmp_path))
    text = "".join(map(str, range(2000)))
    dashboard.introduce(study, text, tmp_path)
    assert note_of(study).startswith(f"{text}\n- folder")
    pieces = [key for key in study._storage.get_study_system_attrs(study._study_id) if "note_str" in key]
    assert len(pieces) == 4  # 6890 characters and what follows, 2045 a piece


def test_pictures_that_cannot_be_kept_stop_nothing(tmp_path, caplog):
    plan = tiny_plan(tmp_path, {"methods": ["zerofl"]})
    trial = Search(plan, plan.contenders["zerofl"], open_journal(tmp_path), "mark").ask()
    (tmp_path / "curves.png").write_bytes(b"picture")
    (tmp_path / "artifacts").write_text("a file where a folder is needed")
    present(trial, "zerofl", tmp_path, tmp_path / "artifacts", "finished")
    assert "curves.png is not shown in the dashboard" in caplog.text


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("http://tracker:5000/", "- [MLflow run `ab12` of experiment x](http://tracker:5000/#/runs/ab12)"),
        ("https://me@tracker/m", "- [MLflow run `ab12` of experiment x](https://tracker/m/#/runs/ab12)"),
        ("databricks", "- MLflow run `ab12` of experiment x, at `databricks`"),
    ],
)
def test_where_a_run_is_in_mlflow(uri, line):
    cursor = dashboard.Cursor(uri, "x", "run", {}, {}, None, run_id="ab12")
    assert dashboard._in_mlflow(cursor) == [line]


def test_the_command_that_opens_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = StudyFolder(Path.cwd() / "runs" / "a study")
    monkeypatch.setattr(dashboard, "installed", lambda _: True)
    artifacts = "--artifact-dir 'runs/a study/artifacts'"
    assert dashboard.command(folder.path, JOURNAL, None) == (
        f"optuna-dashboard 'runs/a study/study.journal' {artifacts}"
    )
    # The shell puts the password in, and it is shown to nobody.
    url = "postgresql://me:${DB_PASSWORD}@host/db"
    assert dashboard.command(folder.path, JOURNAL, url) == f'optuna-dashboard "{url}" {artifacts}'
    monkeypatch.setattr(dashboard, "installed", lambda _: False)
    assert dashboard.command(folder.path, JOURNAL, None).endswith('   # pip install "sparsyfed[dashboard]"')
