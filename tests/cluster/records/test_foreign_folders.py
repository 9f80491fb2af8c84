"""Nothing that a folder names runs by looking at it, and resume of somebody else's asks first."""

import os
import shutil
from pathlib import Path

import fsspec
import pytest
import yaml

import cluster
from cluster.cli import main
from cluster.configuration.choices import ChoiceError
from cluster.configuration.config import resolve, validate
from cluster.configuration.foreign import ForeignCodeError, references_in
from cluster.execution import complete
from cluster.records.run_folder import RunFolder
from tests.cluster.compare.made import write_run

pytestmark = pytest.mark.usefixtures("no_pictures")

#: A module that cannot be imported, nor any part of it called, without leaving a file.
TRACE = """
from pathlib import Path
Path("TRACE").touch()
from algorithms import Algorithm
class Method(Algorithm): pass
def anything(*_, **__): Path("TRACE").touch()
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """The working directory, with a module ``evil`` that leaves ``TRACE`` behind when it is touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "evil.py").write_text(TRACE)
    return tmp_path


def changed(folder, **sections):
    """A run's folder as somebody else may hand it over."""
    file = folder / "config.yaml"
    tree = yaml.safe_load(file.read_text()) | sections
    file.write_text(yaml.safe_dump(tree))
    (folder / "checkpoints").mkdir(exist_ok=True)
    return folder


CODE = {
    "sampler": {"sampler": {"name": "os:system", "command": "touch TRACE"}},
    "algorithm": {"algorithm": {"name": "evil:Method"}},
    "server": {"server": {"name": "evil:Method"}},
    "model": {"model": {"name": "evil:anything"}},
    "data": {"data": {"name": "evil:anything"}},
    "extends": {"extends": "quickstart", "algorithm": {"name": "evil:Method"}},
}


@pytest.mark.parametrize("named", CODE)
def test_looking_at_a_folder_runs_nothing_of_it(evil, capsys, named):
    folder = changed(write_run(evil / "runs" / "one", [0.5, 0.6]), **CODE[named])
    assert main(["compare", "--output", "table"]) == 0
    assert main(["sync", str(folder)]) == 2  # it was never tracked
    assert main(["describe", f"{folder}/config.yaml"]) == main(["describe", str(folder)])
    capsys.readouterr()
    status = main(["describe", str(folder)])
    out = capsys.readouterr().out
    assert status == 0 if named != "extends" else 2
    for key in CODE[named]:
        if named != "extends":
            assert f"{key}.name = {CODE[named][key]['name']}" in out
    assert not Path("TRACE").exists()


@pytest.mark.parametrize("named", [*CODE, "shift"])
def test_resume_says_whose_code_it_would_run(evil, named):
    sections = CODE.get(named, {"shift": {"round": 2, "partition": {"name": "evil:anything"}}})
    folder = changed(write_run(evil / "runs" / "one", [0.5], rounds=2), **sections)
    with pytest.raises(ForeignCodeError) as refused:
        cluster.resume(folder)
    (reference,) = references_in(sections).values()
    for part in ("runs/one was copied here", reference, f"sparsyfed resume {folder} --trust"):
        assert part in str(refused.value)
    assert main(["resume", "runs/one"]) == 2
    assert not Path("TRACE").exists()


def test_what_is_trusted_runs(evil):
    folder = changed(write_run(evil / "runs" / "one", [0.5], rounds=2), **CODE["sampler"])
    with pytest.raises(cluster.ConfigError, match="a factory that returns a sampler"):
        cluster.resume(folder, trust=True)
    assert Path("TRACE").exists()


@pytest.mark.parametrize("how", ["in place", "renamed", "copied", "archived", "edited", "others may write"])
def test_a_folder_is_ones_own_where_it_was_written_by_this_user(evil, how):
    config = resolve("quickstart", ["execution=inline", "data.name=tests.tiny_experiment:tiny_images"])
    folder = RunFolder.create(evil / "run", config).path
    own = how in ("in place", "renamed")
    if how == "renamed":
        folder = folder.rename(evil / "other")
    elif how == "copied":
        folder = Path(shutil.copytree(folder, evil / "other", copy_function=shutil.copy2))
    elif how == "archived":
        archive = shutil.make_archive(str(evil / "run"), "tar", evil, "run")
        shutil.rmtree(folder)
        shutil.unpack_archive(archive, evil)
    elif how == "edited":
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("rounds: 30", "rounds: 31"))
    elif how == "others may write":
        (folder / "config.yaml").chmod(0o646)
    if own:
        assert cluster.execution.open_run(folder).path == folder
    else:
        with pytest.raises(ForeignCodeError, match=r"others may write|was copied here"):
            cluster.execution.open_run(folder)
    assert cluster.execution.open_run(folder, trust=True).path == folder


def test_another_users_folder_is_named_as_theirs(evil, monkeypatch):
    config = resolve("quickstart", ["data.name=tests.tiny_experiment:tiny_images"])
    folder = RunFolder.create(evil / "run", config).path
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_001)
    with pytest.raises(ForeignCodeError, match=rf"belongs to .*{os.getuid()}"):
        cluster.execution.open_run(folder)


def test_an_umask_that_lets_a_group_write_does_not_make_a_folder_foreign(evil):
    before = os.umask(0o002)
    try:
        config = resolve("quickstart", ["data.name=tests.tiny_experiment:tiny_images"])
        folder = RunFolder.create(evil / "run", config).path
    finally:
        os.umask(before)
    assert cluster.execution.open_run(folder).path == folder


def test_a_folder_that_names_no_code_is_resumed_by_anybody(evil):
    folder = changed(write_run(evil / "one", [0.5]))
    assert cluster.execution.open_run(folder).path == folder


def test_shared_storage_does_not_tell_who_wrote_a_run(evil):
    memory = fsspec.filesystem("memory")
    with memory.open("/foreign/one/config.yaml", "w") as file:
        file.write(yaml.safe_dump(CODE["sampler"]))
    with pytest.raises(ForeignCodeError, match=r"memory://foreign/one does not tell who wrote it.*os:system"):
        cluster.resume("memory://foreign/one")
    assert not Path("runs").exists()
    assert not Path("TRACE").exists()


def test_a_grid_or_study_does_not_import_what_another_folder_names(evil):
    folder = changed(write_run(evil / "one", [0.5]), **CODE["algorithm"])
    with pytest.raises(cluster.ConfigError, match="holds a run of another configuration"):
        complete(resolve("quickstart"), folder)
    assert not Path("TRACE").exists()


def test_code_is_found_anywhere_in_a_study_or_grid():
    tree = {
        "data": {"name": "a:b"},
        "partition": {"name": "c:d"},
        "tracking": {"tags": {"model": "no: code"}, "uri": "http://host:5000"},
        "study": {"methods": ["topk", "e:f", {"name": "g:h"}], "storage": "sqlite:///x.db"},
        "grid": {
            "algorithm": [{"name": "i:j"}, {"name": "topk"}],
            "sampler.name": ["uniform", "k:l"],
            "method": {"one": {"server": {"name": "m:n"}}},
        },
        "shift": {"partition": {"name": "o:p"}},
    }
    assert set(references_in(tree).values()) == {"a:b", "c:d", "e:f", "g:h", "i:j", "k:l", "m:n", "o:p"}


def test_a_run_records_every_hyperparameter_so_that_comparing_needs_no_import(evil):
    config = resolve("quickstart", ["algorithm.name=tests.example_method:RandomK"])
    folder = RunFolder.create(evil / "one", config)
    stored = folder.config(inert=True)
    assert stored.values("algorithm") == {"sparsity": 0.9, "unbiased": False}
    assert stored.flat() == config.flat()
    assert stored.digest() == config.digest()
    with pytest.raises(ChoiceError, match="imported by resume alone"):
        _ = stored.method


def test_an_inert_configuration_is_still_checked():
    tree = {"algorithm": {"name": "evil:Method"}, "server": {"name": "fedadam", "lrr": 1}, "cohort": 1000}
    with pytest.raises(cluster.ConfigError) as refused:
        validate(tree, inert=True)
    assert "did you mean lr?" in str(refused.value)
    assert "cohort: 1000 clients" in str(refused.value)
