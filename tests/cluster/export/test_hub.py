"""A model hub's folder: what the hub's own library reads of it, and that it loads without the run."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cluster
from cluster.export import hub
from cluster.export.finished import ExportError, Finished
from cluster.workload.models import ModelError
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "model"
    said = hub.write(finished, folder)
    assert said == f"upload    hf upload OWNER/NAME {folder}"
    return folder


def test_the_folder_holds_what_a_hub_shows(finished, folder):
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == finished.folder.model_file.read_bytes()
    card = ModelCard.load(folder / "README.md")
    results = {(one.dataset_split, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert results["test", "accuracy"] == finished.line["test/accuracy"]
    assert results["validation", "loss"] == finished.line["val/loss"]
    assert card.data.library_name == "pytorch"
    assert "float32 images [n, 1, 8, 8] of values x / 127.5 - 1" in card.text
    for path in folder.iterdir():
        assert str(finished.folder.path).encode() not in path.read_bytes()


def test_the_folder_loads_without_the_runs_data(finished, folder):
    model = cluster.load_model(folder)
    assert not model.training
    inputs = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(inputs), finished.model(inputs))


def test_a_run_of_before_gets_the_metadata(finished, folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for path in finished.folder.path.iterdir():
        if path.is_file():
            (run / path.name).write_bytes(path.read_bytes())
    save_file(load_file(run / "model.safetensors"), run / "model.safetensors")
    (run / "README.md").unlink()
    hub.write(Finished.open(run), tmp_path / "out")
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_code_that_a_folder_names_is_run_on_request_alone(cache, tmp_path):
    config = tiny_federation(cache, rounds=1, model={"name": "tests.tiny_experiment:tiny_model"})
    hub.write(Finished.open(cluster.run(config, tmp_path / "run").folder), tmp_path / "model")
    with pytest.raises(ModelError, match=r"config.json names code, model.name = tests.tiny_exp"):
        cluster.load_model(tmp_path / "model")
    model = cluster.load_model(tmp_path / "model", trust=True)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_what_is_no_exported_folder_is_said_in_a_line(folder, tmp_path):
    with pytest.raises(ModelError, match=r"holds no config.json; expected a folder of `export --to hub`"):
        cluster.load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ModelError, match=r"config.json is none of sparsyfed's: KeyError: 'model'"):
        cluster.load_model(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"model.safetensors = .*: there is no such file"):
        cluster.load_model(tmp_path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": {"name": 5, "options": {}}}, "model.name is a text, found 5"),
        ({"model": {"name": "mlp", "options": []}}, r"model.options are keys and values, found \[\]"),
        ({"model": {"name": "mlp", "options": {"seed": 1}}}, "model.options.seed is no option of a model"),
        (
            {"model": {"name": "mlp", "options": {"name": "mlp"}}},
            "model.options.name is no option of a",
        ),
        (
            {"model": {"name": "timm", "options": {"folder": "x"}}},
            "model.folder = x is a file, and a model's",
        ),
        (
            {"model": {"name": "timm", "options": {"config": "x"}}},
            "model.config = x is a file, and a model's",
        ),
        ({"input_shape": 8}, "input_shape is a list of whole numbers, found 8"),
        ({"input_shape": [1, "8"]}, r"input_shape is a list of whole numbers, found \[1, '8'\]"),
        ({"outputs": 0}, "outputs is a whole number of at least 1, found 0"),
        ({"outputs": "10"}, "outputs is a whole number of at least 1, found '10'"),
        ({"tokens": None}, "tokens is a whole number of at least 0, found None"),
    ],
)
def test_a_malformed_description_is_said_in_a_line(folder, tmp_path, changed, says):
    told = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | changed))
    with pytest.raises(ModelError, match=rf"config.json describes no model: {says}"):
        cluster.load_model(tmp_path)


def test_a_downloaded_folder_has_timm_unpickle_nothing(folder, tmp_path):
    told = json.loads((folder / "config.json").read_text())
    options = {"architecture": "resnet18", "config": {"checkpoint_path": str(tmp_path / "x.pth")}}
    told |= {"model": {"name": "timm", "options": options}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match=r"model.config.checkpoint_path: has timm read weights of a file"):
        cluster.load_model(tmp_path)


def test_a_model_that_began_with_a_folder_is_left_to_its_library(finished, tmp_path):
    model = {"name": "timm", "architecture": "vit_tiny", "folder": str(tmp_path)}
    config = tiny_federation(tmp_path, model=model)
    with pytest.raises(ExportError, match=r"model.folder = .* lies on this machine, and a hub's"):
        hub.write(Finished(finished.folder, config, finished.result), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_description_says_what_goes_in_and_comes_out(folder):
    told = json.loads((folder / "config.json").read_text())
    assert told["model"]["name"] == "small_cnn"
    assert (told["input_shape"], told["inputs"], told["outputs"]) == ([1, 8, 8], "pixels", 10)
    assert told["labels"] == list("0123456789")
