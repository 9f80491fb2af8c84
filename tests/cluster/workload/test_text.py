"""Text as tokens: samples by hand, what columns and tokenizers mean, groups, and what is refused."""

import hashlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.configuration.config import resolve
from cluster.federation import Federation
from cluster.references import DataError, UserError
from cluster.workload.datasets import open_dataset
from cluster.workload.partitioners import Natural, PartitionError
from cluster.workload.preparing import prepare
from cluster.workload.tiny_text import SPEAKERS, texts

B = 256  # the boundary of bytes


def stored(folder, train, test=("xyz",), column="text", **others):
    """Parquet files of texts."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: list(train), **others}), folder / "train.parquet")
    columns = {column: list(test)} | {name: ["?"] * len(test) for name in others}
    pq.write_table(pa.table(columns), folder / "test.parquet")
    return folder


def prepared(folder, cache, **options):
    options = {"takes_text": True, "targets": "tokens", "length": 3} | options
    return open_dataset(prepare(name="mine", path=str(folder), cache_dir=cache, **options))


def test_samples_by_hand(tmp_path):
    dataset = prepared(stored(tmp_path / "set", ["ab", "", "abcdefg", "abc"]), tmp_path / "cache")
    a, b, c, d, e, f, g = b"abcdefg"
    inputs = [[B, a, B], [B, a, b], [c, d, e], [f, B, B], [B, a, b]]
    targets = [[a, b, -100], [a, b, c], [d, e, f], [g, -100, -100], [a, b, c]]
    assert dataset.train.inputs.tolist() == inputs
    assert dataset.train.targets.tolist() == targets
    assert (dataset.train.inputs.dtype, dataset.train.targets.dtype) == (np.int16, np.int64)
    assert (dataset.classes, len(dataset.vocabulary), dataset.vocabulary[B]) == ((), 257, "<boundary>")
    assert dataset.vocabulary[a] == "a"
    assert dataset.test.targets.tolist() == [[*b"xyz"]]
    assert dataset.train.groups is None


@pytest.mark.parametrize("length", [1, 2, 5, 64])
def test_every_byte_is_foretold_once_from_those_before_it(tmp_path, length):
    rows = ["To be, or not to be", "é€𝄞", "x" * 64, "y" * 65, "z"]
    dataset = prepared(stored(tmp_path / "set", rows), tmp_path / "cache", length=length)
    inputs, targets = dataset.train.inputs, dataset.train.targets
    kept = targets != -100
    assert bytes(targets[kept].astype(np.uint8)) == "".join(rows).encode()
    before = [B if place == 0 else code for row in rows for place, code in enumerate([0, *row.encode()[:-1]])]
    assert inputs[kept].tolist() == before
    assert (inputs[~kept] == B).all()
    assert (kept[:, 0]).all()  # no sample is nothing but padding


def test_characters_are_those_of_train(tmp_path):
    folder = stored(tmp_path / "set", ["baé", "ab"], ["abz"])
    dataset = prepared(folder, tmp_path / "cache", tokenizer="characters")
    assert dataset.vocabulary == ("a", "b", "é", "<unknown>", "<boundary>")
    assert dataset.train.targets.tolist() == [[1, 0, 2], [0, 1, -100]]
    assert dataset.train.inputs.tolist() == [[4, 1, 0], [4, 0, 4]]
    assert dataset.test.targets.tolist() == [[0, 1, 3]]


def test_a_large_vocabulary_has_room(tmp_path):
    characters = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 20_000)) + "".join(
        chr(code) for code in range(0x20000, 0x20000 + 20_000)
    )
    dataset = prepared(stored(tmp_path / "set", [characters]), tmp_path / "cache", tokenizer="characters")
    assert dataset.train.inputs.dtype == np.int32
    assert dataset.train.targets[dataset.train.targets != -100].tolist() == list(range(40_000))


def test_the_column_is_inferred_and_groups_go_with_their_rows(tmp_path):
    folder = stored(tmp_path / "set", ["abcd", "", "a", "ab"], column="said", speaker=["u", "v", "v", "u"])
    dataset = prepared(folder, tmp_path / "cache", group_column="speaker")
    assert dataset.group_names == ("u", "v")
    assert dataset.train.groups.tolist() == [0, 0, 1, 0]
    with pytest.raises(DataError, match=r"data.text_column cannot be inferred .*'said', 'speaker'"):
        prepared(folder, tmp_path / "cache")
    named = prepared(folder, tmp_path / "cache", text_column="said")
    assert named.train.targets.tolist() == dataset.train.targets.tolist()
    assert named.fingerprint != dataset.fingerprint


def test_a_form_of_its_own_is_a_data_set_of_its_own(tmp_path):
    folder = stored(tmp_path / "set", ["abcd"])
    forms = [{"length": 2}, {"length": 3}, {"tokenizer": "characters"}, {}, {"tokenizer": "bytes"}]
    found = [prepared(folder, tmp_path / "cache", **form).fingerprint for form in forms]
    assert len(set(found)) == 3
    assert found[1] == found[3] == found[4]


def test_data_of_other_kinds_keep_their_fingerprints(tmp_path):
    assert prepare(name="digits", cache_dir=tmp_path).name == "digits-0d84dc8e3a7d"


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (["", ""], {}, r"column 'text' of .*train.parquet holds no text: all of its 2 rows are empty"),
        ([], {}, r"holds no text: it has no rows"),
        (["a", None], {}, "row 1 holds None; allowed are texts"),
        ([1, 2], {"text_column": "text"}, "row 0 holds 1; allowed are texts"),
        ([1, 2], {}, "row 0 holds 1; allowed are texts"),
        (["a"], {"text_column": "txt"}, r"data.text_column = 'txt' is no column .*did you mean text"),
        (["a"], {"group_column": "by"}, r"data.group_column = 'by' is no column"),
        (["a"], {"image_column": "text"}, "data.image_column = 'text' has no meaning for text: leave it out"),
        (["a"], {"label_column": "text"}, "data.label_column = 'text' has no meaning for text"),
        (["a"], {"features": "logmel"}, "data.features = 'logmel' has no meaning for text"),
        (["a"], {"exclude_classes": ["a"]}, r"data.exclude_classes = \['a'\] has no meaning for text"),
        (["a"], {"takes_text": False}, "data.length = 3 has no meaning without text .*language_model"),
    ],
)
def test_what_is_no_text_says_so(tmp_path, train, options, message):
    kind = pa.string() if not train else None
    folder = stored(tmp_path / "set", pa.array(train, kind).to_pylist() if train else pa.array([], kind))
    with pytest.raises(DataError, match=message) as raised:
        prepared(folder, tmp_path / "cache", **options)
    assert "\n" not in str(raised.value)


def test_a_table_without_texts_says_so(tmp_path):
    folder = stored(tmp_path / "set", [1, 2], [3], column="number")
    message = r"data.text_column cannot be inferred .*no column would fit; name one of .*'number'"
    with pytest.raises(DataError, match=message):
        prepared(folder, tmp_path / "cache")


def test_a_test_split_without_text_says_so(tmp_path):
    with pytest.raises(DataError, match=r"test.parquet holds no text: all of its 1 rows"):
        prepared(stored(tmp_path / "set", ["a"], [""]), tmp_path / "cache")


# --- the embedded text


def test_the_embedded_text_is_always_the_same(tmp_path):
    made = texts()
    whole = "\n".join(made["train_texts"] + made["train_groups"] + made["test_texts"])
    assert hashlib.sha256(whole.encode()).hexdigest()[:16] == "6f4fe11a83f4d6ef"
    assert set("".join(made["train_texts"] + made["test_texts"])) <= set("abcdefghijklmnopqrstuvwxyz .")
    assert Counter(made["train_groups"]) == {name: 12 * n for n, name in enumerate(SPEAKERS, 1)}
    dataset = open_dataset(prepare(name="tiny_text", cache_dir=tmp_path))
    assert dataset.group_names == SPEAKERS
    assert dataset.input_shape == (64,)
    kept = dataset.train.targets != -100
    assert bytes(dataset.train.targets[kept].astype(np.uint8)).decode() == "".join(made["train_texts"])


# --- groups of at least so many samples


def test_small_groups_are_left_out():
    groups = np.array([3, 3, 3, 5, 7, 7, 3, 9, 9, 9])
    labels = np.zeros(10, np.int64)
    divided = Natural(min_samples=3).divide(labels, clients=2, seed=0, groups=groups)
    assert [divided.client(i).tolist() for i in range(2)] == [[0, 1, 2, 6], [7, 8, 9]]
    one = Natural(min_samples=2).divide(labels, clients=1, seed=0, groups=groups)
    assert one.client(0).tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    with pytest.raises(PartitionError, match=r"only 2 groups of at least 3 samples, and .* most 2 clients"):
        Natural(min_samples=3).divide(labels, clients=3, seed=0, groups=groups)
    with pytest.raises(PartitionError, match="min_samples = 5 but the largest of 4 groups has 4 samples"):
        Natural(min_samples=5).divide(labels, clients=1, seed=0, groups=groups)


def test_without_a_minimum_nothing_changes():
    groups = np.random.default_rng(0).integers(0, 12, size=200)
    labels = np.zeros(200, np.int64)
    for clients in (5, 12):
        divided = Natural().divide(labels, clients=clients, seed=4, groups=groups)
        rng = np.random.Generator(np.random.PCG64(4))
        owner = np.arange(12) if clients == 12 else rng.permutation(12) % clients
        for client in range(clients):
            assert divided.client(client).tolist() == np.flatnonzero(owner[groups] == client).tolist()
    plain = resolve("quickstart", ["partition.name=natural", "partition.clients=30"])
    assert plain.digest() == "011f24b796bc"  # as before there was a minimum
    assert resolve(plain.dump(), ["partition.min_samples=2"]).digest() != plain.digest()


# --- data, model and objective that do not belong together


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.name=digits"], "data.name = 'digits' holds no text; use tiny_text, a hub repository"),
        (["data.name=tests.tiny_experiment:tiny_images"], "tiny_images' holds no text; use tiny_text"),
        (
            ["objective.name=classification"],
            "targets of data.name = 'tiny_text' are tokens; set objective.*lang",
        ),
        (
            ["objective.name=regression"],
            "are codes of tokens, which are no quantities; set objective.*language",
        ),
        (
            ["data.group_column=speaker"],
            "data.group_column = 'speaker' has no meaning for data.name = 'tiny_",
        ),
        (
            ["model.name=small_cnn"],
            r"small_cnn cannot be built .*\[64\].* mlp and linear take tables",
        ),
        (["model.name=mlp"], r"model.name = 'mlp' fails on inputs of shape \[2, 64\]"),
        (["partition.clients=9", "cohort=1"], "have only 8 groups, and 'natural' never splits one"),
        (["partition.min_samples=1000"], "partition.min_samples = 1000 but the largest of 8 groups has"),
        (["partition.name=lda"], "partition.name: lda needs the classes .*=language_model has none"),
        (["evaluate_clients.every=1"], "evaluate_clients.every: needs the classes"),
        (["data.tokenizer=words"], "data.tokenizer: .*bytes.*characters"),
        (["data.length=0"], "data.length: "),
    ],
)
def test_what_does_not_belong_together_is_told(cache, overrides, message):
    base = ["objective.name=language_model", "data.name=tiny_text", "model.name=transformer", "cohort=2"]
    base += ["partition.name=natural", "partition.clients=8", f"data.cache={cache}"]
    with pytest.raises(UserError, match=message) as raised:
        Federation.of(resolve("quickstart", [*base, *overrides]))
    assert "\n" not in str(raised.value)
    Federation.of(resolve("quickstart", base))


def test_a_transformer_takes_no_images(cache):
    overrides = ["model.name=transformer", f"data.cache={cache}"]
    with pytest.raises(UserError, match=r"takes tokens \[T\], samples have shape \[1, 8, 8\]"):
        Federation.of(resolve("quickstart", overrides))
