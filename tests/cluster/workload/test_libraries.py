"""Models of timm and transformers: what is prunable, folders checked by name, logits, and short runs.

Each half runs where its library is installed.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cluster
from algorithms.core.parameters import ParameterLayout
from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from cluster.workload import models
from cluster.workload.models import ModelError
from tests.cluster.workloads import import_timm
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

GPT2 = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 8}
IMAGE_TYPE = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "patch_size": 4,
}  # fmt: skip
TINY_VIT = {
    "embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4],
    "window_sizes": [2, 2, 2, 2],
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def timm():
    return import_timm()


def of_transformers(shape=(8,), classes=17, seed=1, **options):
    return models.build("transformers", input_shape=shape, classes=classes, seed=seed, **options)


def gpt2(**options):
    return of_transformers(architecture="gpt2", config=GPT2, **options)


def tokens(rows=3, length=8, vocabulary=17):
    return torch.from_numpy(np.random.default_rng(1).integers(0, vocabulary, (rows, length)))


# --- transformers


def test_gpt2s_layers_are_linear_and_compute_what_transformers_computes(transformers):
    model = gpt2().eval()
    layout = ParameterLayout.of(model, tokens())
    at = "transformer.h.0"
    assert {entry.name: entry.shape for entry in layout.prunable} == {
        f"{at}.attn.c_attn.weight": (48, 16),
        f"{at}.attn.c_proj.weight": (16, 16),
        f"{at}.mlp.c_fc.weight": (64, 16),
        f"{at}.mlp.c_proj.weight": (16, 64),
    }
    # The head shares the tokens' table, which is trained dense.
    tables = {entry.name for entry in layout.other if len(entry.shape) > 1}
    assert tables == {"transformer.wte.weight", "transformer.wpe.weight"}
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=17, **GPT2)).eval()
    transposed = {
        name: tensor.t() if name in {entry.name for entry in layout.prunable} else tensor
        for name, tensor in model.state_dict().items()
    }
    plain.load_state_dict(transposed)
    torch.testing.assert_close(model(tokens()), plain(tokens()).logits, atol=1e-6, rtol=1e-5)


def test_weights_follow_from_the_seed_alone(transformers):
    state = torch.get_rng_state()
    first, second, other = gpt2(), gpt2(), gpt2(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, one), two in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert not torch.equal(first.transformer.wte.weight, other.transformer.wte.weight)


def test_a_folder_begins_with_its_weights(transformers, tmp_path):
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=17, **GPT2))
    plain.save_pretrained(tmp_path / "whole")
    model = of_transformers(folder=str(tmp_path / "whole")).eval()
    torch.testing.assert_close(model(tokens()), plain.eval()(tokens()).logits, atol=1e-6, rtol=1e-5)
    # The body alone, as many are published, has no head of its own: this one's is the tokens' table.
    plain.transformer.save_pretrained(tmp_path / "body")
    again = of_transformers(folder=str(tmp_path / "body"), architecture="gpt2").eval()
    assert torch.equal(again(tokens()), model(tokens()))


def test_what_does_not_fit_a_folder_is_named_or_drawn_anew(transformers, tmp_path):
    config = transformers.ViTConfig(image_size=8, num_channels=1, num_labels=10, **IMAGE_TYPE)
    stored = transformers.ViTForImageClassification(config)
    stored.save_pretrained(tmp_path / "vit")
    folder = {"shape": (1, 8, 8), "classes": 3, "folder": str(tmp_path / "vit")}
    with pytest.raises(
        ModelError,
        match=r"model.folder = .*vit does not fit ViTForImageClassification: classifier.bias is \[10\], the "
        r"model's is \[3\]; classifier.weight .*; model.fresh names what is to be drawn anew",
    ):
        of_transformers(**folder)
    model = of_transformers(**folder, fresh=["classifier.*"])
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    for name, tensor in model.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(tensor, stored.state_dict()[name]), name
    tensors = load_file(tmp_path / "vit" / "model.safetensors")
    lost = sorted(tensors)[5]
    tensors["extra"] = tensors.pop(lost)
    save_file(tensors, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"extra is no tensor of the model; .* is missing;"):
        of_transformers(**folder, fresh=["classifier.*"])


def test_padding_of_a_text_is_seen_by_nobody(transformers):
    form = {k: v for k, v in IMAGE_TYPE.items() if k != "patch_size"}
    for name, config in (("BertForSequenceClassification", form), ("GPT2ForSequenceClassification", GPT2)):
        architecture = models.build_choice("model", "transformers", {"architecture": name, "config": config})
        model = architecture.build((8,), 3, vocabulary=17).eval()
        text = tokens(vocabulary=16)
        short = torch.full_like(text, 16)
        short[:, :5] = text[:, :5]
        torch.testing.assert_close(model(short), model(short[:, :5]), atol=1e-6, rtol=1e-5)
        assert model(text).shape == (3, 3)
        assert not torch.allclose(model(text), model(short))


def test_a_folder_without_the_boundary_of_texts_has_its_own_token_in_its_place(transformers, tmp_path):
    # 16 tokens of the folder and of its tokenizer; 16 is the data's boundary, which begins and fills texts.
    config = transformers.GPT2Config(vocab_size=16, bos_token_id=3, eos_token_id=3, **GPT2)
    plain = transformers.GPT2LMHeadModel(config).eval()
    plain.save_pretrained(tmp_path / "gpt2")
    model = of_transformers(folder=str(tmp_path / "gpt2"), classes=17).eval()
    text = tokens(vocabulary=16)
    text[:, 0] = 16
    seen = torch.where(text == 16, 3, text)
    logits = model(text)
    torch.testing.assert_close(logits[..., :16], plain(seen).logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits.softmax(-1)[..., :16], plain(seen).logits.softmax(-1))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), seen.flatten()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    form = {k: v for k, v in IMAGE_TYPE.items() if k != "patch_size"}
    config = transformers.BertConfig(vocab_size=16, pad_token_id=0, num_labels=3, **form)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    build = models.build_choice("model", "transformers", {"folder": str(tmp_path / "bert")}).build
    model = build((8,), 3, vocabulary=17).eval()
    text = tokens(vocabulary=16)
    text[:, 5:] = 16
    torch.testing.assert_close(model(text), model(text[:, :5]), atol=1e-6, rtol=1e-5)
    with pytest.raises(
        ModelError, match=r"knows 16 tokens, and data.tokenizer gives 20; name the folder's own"
    ):
        build((8,), 3, vocabulary=21)


def test_a_folder_that_knows_the_boundary_keeps_it_as_padding(transformers, tmp_path):
    form = {k: v for k, v in IMAGE_TYPE.items() if k != "patch_size"}
    config = transformers.BertConfig(vocab_size=20, pad_token_id=0, num_labels=3, **form)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    build = models.build_choice("model", "transformers", {"folder": str(tmp_path / "bert")}).build
    model = build((8,), 3, vocabulary=17).eval()
    text = tokens(vocabulary=16)
    text[:, 5:] = 16
    torch.testing.assert_close(model(text), model(text[:, :5]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["sparsyfed", "zerofl"])
def test_gpt2_learns_text_and_its_file_begins_another_run(transformers, cache, tmp_path, method):
    text = {
        "data": {"name": "tiny_text", "length": 8},
        "objective": {"name": "language_model"},
        "partition": {"name": "iid"},
        "algorithm": {"name": method, "sparsity": 0.5},
        "local": {"batch_size": 32},
        "cohort": 1,
    }
    model = {"name": "transformers", "architecture": "gpt2", "config": GPT2}
    text["partition"]["clients"] = 40
    result = cluster.run(tiny_federation(cache, model=model, **text), tmp_path / "run")
    losses = result.rounds["train/loss"]
    assert losses.iloc[-1] < losses.iloc[0]
    stored = tmp_path / "run" / "model.safetensors"
    again = tiny_federation(cache, model={**model, "weights": str(stored)}, **text)
    assert cluster.run(again, tmp_path / "again").rounds["train/loss"].iloc[0] < losses.iloc[0]


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_texts_are_classified(transformers, cache, tmp_path, architecture):
    form = {k: v for k, v in IMAGE_TYPE.items() if k != "patch_size"}
    config = tiny_federation(
        cache,
        data={"name": "tiny_text", "length": 8},
        objective={"name": "sequence_classification"},
        partition={"name": "iid", "clients": 6},
        model={
            "name": "transformers",
            "architecture": architecture,
            "config": GPT2 if architecture.startswith("GPT2") else form,
        },
        algorithm={"name": "sparsyfed", "sparsity": 0.5},
        rounds=1,
        cohort=2,
    )
    result = cluster.run(config, tmp_path / "run")
    assert 0 < result.summary["accuracy"] <= 1
    model = result.model()
    assert model.config.vocab_size == 257
    assert model.masked == model.config.pad_token_id == 256


def test_an_experiment_is_known_by_what_is_in_the_folder(tmp_path):
    def digest(folder, **more):
        model = {"name": "timm", "folder": str(folder), **more}
        return resolve({"model": model}).digest()

    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"architecture": "a"}')
        save_file({"w": torch.zeros(1)}, tmp_path / name / "model.safetensors")
    first = digest(tmp_path / "here")
    assert first == digest(tmp_path / "there") != digest(tmp_path / "there", fresh=["w"])
    save_file({"w": torch.ones(1)}, tmp_path / "there" / "model.safetensors")
    assert digest(tmp_path / "there") != first
    (tmp_path / "config.json").write_text('{"n_layer": 1}')
    by_file, by_key = (
        resolve({"model": {"name": "transformers", "architecture": "gpt2", "config": config}}).digest()
        for config in (str(tmp_path / "config.json"), {"n_layer": 1})
    )
    assert by_file != by_key
    narrowed = resolve("quickstart", ["model.name=transformers", "model.config.n_layer=2"])
    assert narrowed.model.options["config"] == {"n_layer": 2}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"architecture": "vitt"}, "'vitt' is neither a model class nor a type of .*; did you mean vit[?]"),
        ({"architecture": "gpt2", "config": {**GPT2, "n_layers": 2}},
         "model.config.n_layers: GPT2Config has no such field; did you mean n_layer[?]"),
        ({"architecture": "gpt2", "config": {**GPT2, "n_head": 3}}, "'gpt2' cannot be built with .*"),
        ({}, "model.architecture: none; name one, or a model.folder"),
        ({"architecture": "gpt2", "fresh": ["*"]}, "model.fresh: names tensors of model.folder, and"),
        ({"architecture": "gpt2", "folder": "absent"}, "model.folder = absent holds no model.safetensors"),
        ({"architecture": "gpt2", "config": "absent"}, "model.config: absent: cannot be read: No such file"),
    ],
)  # fmt: skip
def test_what_transformers_cannot_build(transformers, options, match):
    with pytest.raises(ModelError, match=match):
        of_transformers(**options)


def test_a_configuration_is_keys_and_values_or_a_file():
    with pytest.raises(
        ConfigError, match=r"model.config: expected keys and values, or a file of them, found 3"
    ):
        resolve("quickstart", ["model.name=timm", "model.config=3"])


# --- timm


def of_timm(shape=(3, 32, 32), classes=5, seed=1, **options):
    return models.build("timm", input_shape=shape, classes=classes, seed=seed, **options)


def tiny_vit(**options):
    return of_timm(architecture="tiny_vit_5m_224", config=TINY_VIT, **options)


def test_projections_of_tiny_vit_are_prunable_and_its_biases_of_attention_are_not(timm):
    layout = ParameterLayout.of(tiny_vit(), torch.zeros(2, 3, 32, 32))
    prunable = {entry.name for entry in layout.prunable}
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "local_conv.conv"):
        assert f"stages.1.blocks.0.{layer}.weight" in prunable
    assert {"patch_embed.conv1.conv.weight", "head.fc.weight"} <= prunable
    dense = {entry.name for entry in layout.other if len(entry.shape) > 1}
    assert dense == {f"stages.{stage}.blocks.0.attn.attention_biases" for stage in (1, 2, 3)}


def test_timms_weights_follow_from_the_seed_alone(timm):
    first, second, other = (tiny_vit(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not torch.equal(first["head.fc.weight"], other["head.fc.weight"])


def test_a_folder_of_timm_begins_with_its_weights(timm, tmp_path):
    stored = tiny_vit(classes=7, seed=3).state_dict()
    save_file(stored, tmp_path / "model.safetensors")
    described = {"architecture": "tiny_vit_5m_224", "num_classes": 7, "model_args": TINY_VIT}
    (tmp_path / "config.json").write_text(json.dumps({**described, "pretrained_cfg": {"tag": "mine"}}))
    same = of_timm(folder=str(tmp_path), classes=7).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in same.items())
    with pytest.raises(ModelError, match=r"head.fc.bias is \[7\], the model's is \[5\]; .*model.fresh names"):
        of_timm(folder=str(tmp_path))
    fresh = of_timm(folder=str(tmp_path), fresh=["head.fc.*"]).state_dict()
    assert all(torch.equal(fresh[name], stored[name]) for name in stored if not name.startswith("head.fc."))


def test_tiny_vit_trains_and_is_evaluated_with_the_weights_at_hand(timm, cache, tmp_path):
    model = {"name": "timm", "architecture": "tiny_vit_5m_224", "config": {**TINY_VIT}}
    data = {"name": f"{__name__}:enlarged"}
    algorithm = {"name": "sparsyfed", "sparsity": 0.5}
    config = tiny_federation(cache, model=model, data=data, algorithm=algorithm, cohort=2)
    result = cluster.run(config, tmp_path / "run")
    federation = cluster.federation.Federation.of(config)
    plain = result.model().eval()
    images = torch.from_numpy(federation.dataset.test.inputs.copy()).float().div(255).sub(0.5).div(0.5)
    right = int((plain(images).argmax(1).numpy() == federation.dataset.test.targets).sum())
    assert right / len(images) == pytest.approx(result.summary["accuracy"])


def enlarged():
    """The tiny images, four times as large."""
    from tests.tiny_experiment import tiny_images

    whole = tiny_images()
    return {
        name: np.kron(array, np.ones((1, 4, 4), np.uint8)) if "images" in name else array
        for name, array in whole.items()
    }


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"architecture": "tinyvit"}, "'tinyvit' is no model of timm .*; did you mean tiny_vit_5m_224[?]"),
        ({"architecture": "resnet18", "config": {"depht": 3}}, "'resnet18' cannot be built with .*depht"),
        ({"architecture": "resnet18", "shape": (30,)}, r"'timm' takes images, samples have shape \[30\]"),
    ],
)
def test_what_timm_cannot_build(timm, options, match):
    with pytest.raises(ModelError, match=match):
        of_timm(**options)


# --- neither is needed


@pytest.mark.parametrize(
    ("name", "config", "key"),
    [
        ("timm", {"checkpoint_path": "x.pth"}, "checkpoint_path"),
        ("timm", {"pretrained": True}, "pretrained"),
        ("timm", {"model_args": {"checkpoint_path": "x.pth"}}, "checkpoint_path"),
        (
            "timm",
            {"pretrained_cfg": {}, "pretrained_cfg_overlay": {"file": "x.pth"}},
            "pretrained_cfg_overlay",
        ),
        ("transformers", {"model_args": {"checkpoint_path": "x.pth"}}, "model_args.checkpoint_path"),
    ],
)
def test_no_option_has_timm_unpickle_a_file(name, config, key):
    with pytest.raises(ModelError, match=rf"^model.config.{key}: has timm read weights of a file that may"):
        models.build(
            name, input_shape=(3, 8, 8), classes=2, seed=1, architecture="timm_wrapper", config=config
        )


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, name):
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ModelError, match=rf"'{name}' needs the package .*pip install 'sparsyfed\[{name}\]'"):
        models.build(name, input_shape=(3, 8, 8), classes=3, seed=1, architecture="resnet18")
