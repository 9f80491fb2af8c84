"""Classes of texts: samples by hand, padding that nobody sees, whole runs, what is refused."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.configuration.config import resolve
from cluster.federation import Federation
from cluster.references import DataError, UserError
from cluster.workload import models
from cluster.workload.datasets import open_dataset
from cluster.workload.preparing import prepare
from cluster.workload.transformer import TransformerClassifier
from tests.cluster.workload.test_language_model import Noting
from tests.tiny_experiment import run_inline

pytestmark = pytest.mark.usefixtures("no_pictures")
B = 256


def written(folder, train, test):
    folder.mkdir(parents=True, exist_ok=True)
    for split, columns in (("train", train), ("test", test)):
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return folder


def prepared(folder, cache, **options):
    options = {"takes_text": True, "length": 3} | options
    return open_dataset(prepare(name="mine", path=str(folder), cache_dir=cache, **options))


TRAIN = {"text": ["ab", "abcdefg", "c"], "label": ["x", "y", "x"]}
TEST = {"text": ["éa"], "label": ["y"]}


def test_samples_by_hand(tmp_path):
    dataset = prepared(written(tmp_path / "set", TRAIN, TEST), tmp_path / "cache")
    a, b, c = b"abc"
    assert dataset.train.inputs.tolist() == [[a, b, B], [a, b, c], [c, B, B]]  # the rest of a text is cut off
    assert dataset.test.inputs.tolist() == [[*"éa".encode()]]
    assert (dataset.train.inputs.dtype, dataset.train.targets.dtype) == (np.int16, np.int64)
    assert (dataset.classes, dataset.train.targets.tolist()) == (("x", "y"), [0, 1, 0])
    assert (len(dataset.vocabulary), dataset.vocabulary[B]) == (257, "<boundary>")
    foretold = prepared(tmp_path / "set", tmp_path / "cache", targets="tokens", text_column="text")
    assert foretold.folder != dataset.folder
    assert foretold.classes == ()


def test_columns_are_inferred_and_groups_and_classes_go_with_their_rows(tmp_path):
    train = {"said": ["ab", "ba", "bb"], "who": ["v", "u", "v"], "label": ["x", "gone", "y"]}
    folder = written(tmp_path / "set", train, {"said": ["aa"], "label": ["y"]})
    options = {"group_column": "who", "exclude_classes": ["gone"], "tokenizer": "characters"}
    dataset = prepared(folder, tmp_path / "cache", **options)
    assert dataset.vocabulary == ("a", "b", "<unknown>", "<boundary>")  # of the texts that are left
    assert dataset.train.inputs.tolist() == [[0, 1, 3], [1, 1, 3]]
    assert (dataset.classes, dataset.train.targets.tolist()) == (("x", "y"), [0, 1])
    assert dataset.train.groups.tolist() == [0, 0]


OWN = {"train": TRAIN, "test": TEST}


def test_a_function_may_return_texts(tmp_path):
    files = prepared(written(tmp_path / "set", TRAIN, TEST), tmp_path / "cache")
    for targets in ("classes", "tokens"):
        options = {"length": 3, "takes_text": True, "targets": targets, "text_column": "text"}
        mine = open_dataset(prepare(name=f"{__name__}:own", cache_dir=tmp_path / "cache", **options))
        assert mine.test.targets.tolist() == ([1] if targets == "classes" else [[*"éa".encode()]])
        assert mine.vocabulary == files.vocabulary


def own():
    return OWN


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        ({"text": ["ab", "", "c"]}, {}, {}, r"column 'text' of .*train.parquet: row 1 is empty; every text"),
        ({}, {"text": [""]}, {}, r"column 'text' of .*test.parquet: row 0 is empty"),
        ({"text": ["ab", None, "c"]}, {}, {}, "row 1 holds None; allowed are texts"),
        ({}, {"label": ["z"]}, {}, r"test.parquet holds \['z'\], which the training split does not"),
        ({}, {}, {"text_column": "txt"}, r"data.text_column = 'txt' is no column .*did you mean text"),
        ({}, {}, {"label_column": "labels"}, r"data.label_column = 'labels' is no column .*mean label"),
        ({}, {}, {"text_column": "label"}, "data.text_column = 'label' is the column of the labels or"),
        ({}, {}, {"columns": ["text"]}, r"data.columns = \['text'\] has no meaning for text"),
        ({}, {}, {"image_column": "text"}, "data.image_column = 'text' has no meaning for text"),
        ({"text": [1, 2, 3]}, {"text": [1]}, {}, r"row 0 holds 1; allowed are texts"),
    ],
)
def test_bad_texts_say_so(tmp_path, train, test, options, message):
    folder = written(tmp_path / "set", TRAIN | train, TEST | test)
    with pytest.raises(DataError, match=message) as raised:
        prepared(folder, tmp_path / "cache", **options)
    assert "\n" not in str(raised.value)


# --- the model


def reader(pooling, length=6, **options):
    small = {"layers": 2, "width": 8, "heads": 2, "pooling": pooling}
    return models.build(
        "transformer_classifier", input_shape=(length,), classes=3, seed=1, tokens=5, **small, **options
    )


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_is_seen_by_nobody(pooling):
    model, B = reader(pooling), 4
    texts = [[0, 1], [3], [2, 2, 1, 0, 3, 1]]
    padded = torch.tensor([text + [B] * (6 - len(text)) for text in texts])
    outputs = model(padded)
    assert outputs.shape == (3, 3)
    for text, found in zip(texts, outputs, strict=True):
        alone = torch.tensor([text])  # without any padding, naively
        features = model.features(alone)[0]
        answer = model.head(features[-1] if pooling == "last" else features.mean(0))
        torch.testing.assert_close(found, answer)
    outputs[:2].square().sum().backward()
    assert (model.tokens.weight.grad[B] == 0).all()
    assert (model.tokens.weight.grad[[0, 1, 3]] != 0).any(1).all()
    assert (model.places.weight.grad[2:] == 0).all()


def test_nothing_but_padding_is_no_division_by_zero():
    assert all(reader(pooling)(torch.full((1, 6), 4)).isfinite().all() for pooling in ("last", "mean"))


def test_the_decoder_and_the_reader_begin_alike():
    same = {"input_shape": (6,), "classes": 5, "seed": 1, "tokens": 5, "layers": 1, "width": 8, "heads": 2}
    decoder, other = models.build("transformer", **same), models.build("transformer_classifier", **same)
    for name, value in decoder.named_parameters():
        assert torch.equal(value, other.get_parameter(name)), name


def counting(*, input_shape, classes, vocabulary):
    """A model of one's own that asks how many tokens there are."""
    return torch.nn.Sequential(
        torch.nn.Embedding(vocabulary, 4), torch.nn.Flatten(), torch.nn.Linear(4 * input_shape[0], classes)
    )


def plain(*, input_shape, classes, **options):
    assert not options
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, classes))


def test_a_model_of_ones_own_is_told_the_vocabulary_if_it_asks():
    own = {"input_shape": (4,), "classes": 2, "seed": 1}
    assert models.build(f"{__name__}:counting", tokens=9, **own)[0].num_embeddings == 9
    assert models.build(f"{__name__}:counting", tokens=9, vocabulary=11, **own)[0].num_embeddings == 11
    assert models.build(f"{__name__}:plain", tokens=9, **own)[1].out_features == 2


# --- whole runs: who speaks


def noting(*, input_shape, classes, vocabulary):
    inner = TransformerClassifier(layers=1, width=16, heads=2, pooling="mean")
    return Noting(inner.build(input_shape, classes, vocabulary))


def experiment(cache, *more, **sections):
    tree = {
        "rounds": 8,
        "cohort": 4,
        "execution": "inline",
        "objective": {"name": "sequence_classification"},
        "data": {"name": "tiny_text", "length": 48, "tokenizer": "characters", "cache": str(cache)},
        "model": {"name": f"{__name__}:noting"},
        "partition": {"name": "lda", "clients": 6, "alpha": 1.0},
        "local": {"epochs": 2, "batch_size": 16, "lr": 0.01, "optimizer": {"name": "adamw"}},
        "algorithm": {"name": "sparsyfed", "sparsity": 0.5},
        "tracking": {"enabled": False},
    }
    return resolve({**tree, **sections}, more)


def test_a_run_logs_what_its_model_answers_and_never_sees_a_float(cache, tmp_path):
    Noting.given.clear()
    judged = {"every": 8, "after": 2}
    run = run_inline(experiment(cache, "data.validation=0.1", evaluate_clients=judged), tmp_path / "run")
    assert Noting.given == {(torch.int64, 2)}  # training, both splits, clients before and after training
    federation = run.driver.federation
    assert federation.classes == ("ada", "ben", "cleo", "dan", "eve", "finn", "gail", "hugo")
    assert federation.selection_metric == "val/accuracy"
    method = federation.config.method
    weights = method.effective_weights(run.state.weights.clone(), federation.layout)
    federation.layout.bind(federation.model, weights)
    test, loss, hits = federation.dataset.test, 0.0, 0
    assert len(test.targets) == 96
    for tokens, target in zip(test.inputs, test.targets, strict=True):
        text = tokens[tokens != len(federation.dataset.vocabulary) - 1]  # without padding
        with torch.no_grad():
            logits = federation.model.eval()(torch.from_numpy(text.astype(np.int64))[None])[0].double()
        loss -= float(logits[target]) - math.log(sum(math.exp(one) for one in logits))
        hits += int(logits.argmax() == target)
    line = run.lines[-1]
    assert line["test/loss"] == pytest.approx(loss / 96, rel=1e-4)
    assert line["test/accuracy"] == pytest.approx(hits / 96, abs=0.011)
    assert line["train/loss"] < run.lines[0]["train/loss"]
    assert {"clients/accuracy_mean", "clients/accuracy_mean_after", "clients/accuracy_gain"} <= line.keys()


def test_models_that_clients_keep_to_themselves_see_tokens_too(cache, tmp_path):
    Noting.given.clear()
    judged = {"every": 1, "after": 2}
    sections = {"evaluate_clients": judged, "algorithm": {"name": "ef21", "sparsity": 0.5}}
    run = run_inline(experiment(cache, "rounds=2", "local.batch_size=1000", **sections), tmp_path / "run")
    assert Noting.given == {(torch.int64, 2)}
    assert 0 <= run.lines[-1]["clients/accuracy_mean_after"] <= 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.name=digits"], "data.name = 'digits' holds no text; use tiny_text"),
        (["model.name=transformer"], "'transformer' foretells the next token; .*transformer_classifier"),
        (["model.name=mlp"], r"model.name = 'mlp' fails on inputs of shape \[2, 64\]"),
        (["model.name=transformer_classifier", "model.pooling=first"], "'first' is none of last, mean"),
        (
            ["objective.name=classification", "model.name=transformer_classifier"],
            "'tiny_text' are tokens; set objective.name=language_model or sequence_classification",
        ),
        (["objective.name=multilabel", "partition.name=iid"], "targets of .*'tiny_text' are tokens"),
    ],
)
def test_what_does_not_belong_together_is_told(cache, overrides, message):
    base = ["objective.name=sequence_classification", "data.name=tiny_text", f"data.cache={cache}"]
    with pytest.raises(UserError, match=message) as raised:
        Federation.of(resolve("quickstart", [*base, "cohort=2", *overrides]))
    assert "\n" not in str(raised.value)


def test_tokens_need_a_text(cache):
    overrides = ["model.name=transformer_classifier", "data.name=diabetes", f"data.cache={cache}"]
    overrides += ["objective.name=regression", "partition.name=iid"]
    with pytest.raises(UserError, match="'transformer_classifier' takes a text's tokens; these are of none"):
        Federation.of(resolve("quickstart", overrides))
