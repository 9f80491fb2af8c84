"""Trained tokenizers: their codes, vocabulary and place, and what is told where there is none."""

import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.references import DataError
from cluster.workload.datasets import open_dataset
from cluster.workload.preparing import prepare
from cluster.workload.tokens import tokenizer_named
from tests.tiny_experiment import run_inline

tokenizers = pytest.importorskip("tokenizers")


def saved(file):
    """Words of five letters' vocabulary, which adds, cuts and fills up what it is not asked to."""
    words = {"to": 0, "be": 1, "or": 2, "not": 3, "[UNK]": 4, "[CLS]": 7, "[PAD]": 6}  # 5 stands for nothing
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 7)]
    )
    made.enable_padding(length=9, pad_id=6, pad_token="[PAD]")
    made.enable_truncation(2)
    file.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(file))
    return file


def texts(folder):
    folder.mkdir()
    train = {"text": ["to be or not to be", "be"], "label": ["a", "b"]}
    pq.write_table(pa.table(train), folder / "train.parquet")
    pq.write_table(pa.table({"text": ["to question"], "label": ["b"]}), folder / "test.parquet")
    return folder


def prepared(tmp_path, tokenizer, **options):
    folder = tmp_path / "set"
    folder = folder if folder.exists() else texts(folder)
    options = {"takes_text": True, "targets": "tokens", "length": 4} | options
    return open_dataset(
        prepare(
            name="mine", path=str(folder), cache_dir=tmp_path / "cache", tokenizer=str(tokenizer), **options
        )
    )


def test_codes_are_the_tokenizers_and_nothing_is_added_or_cut(tmp_path):
    dataset = prepared(tmp_path, saved(tmp_path / "made" / "tokenizer.json"))
    assert dataset.vocabulary == ("to", "be", "or", "not", "[UNK]", "<5>", "[PAD]", "[CLS]", "<boundary>")
    assert dataset.train.targets.tolist() == [[0, 1, 2, 3], [0, 1, -100, -100], [1, -100, -100, -100]]
    assert dataset.train.inputs.tolist() == [[8, 0, 1, 2], [3, 0, 8, 8], [8, 8, 8, 8]]
    assert dataset.test.targets.tolist() == [[0, 4, -100, -100]]
    read = prepared(tmp_path, tmp_path / "made", targets="classes")
    assert read.train.inputs.tolist() == [[0, 1, 2, 3], [1, 8, 8, 8]]


def test_it_is_known_by_its_content(tmp_path):
    file = saved(tmp_path / "made" / "tokenizer.json")
    one = prepared(tmp_path, file)
    (tmp_path / "other").mkdir()
    shutil.copy(file, tmp_path / "other")
    assert prepared(tmp_path, tmp_path / "other").folder == one.folder
    (tmp_path / "other" / "tokenizer.json").write_text(file.read_text().replace('"or"', '"and"'))
    assert prepared(tmp_path, tmp_path / "other").vocabulary[2] == "and"


def test_an_experiment_is_known_by_its_content(tmp_path):
    def digest(place):
        text = ["objective.name=language_model", "data.name=tiny_text", "model.name=transformer"]
        return resolve("quickstart", [*text, "partition.name=iid", f"data.tokenizer={place}"]).digest()

    first, second = saved(tmp_path / "one" / "tokenizer.json"), saved(tmp_path / "two" / "tokenizer.json")
    assert digest(first) == digest(second) == digest(second.parent)
    second.write_text(second.read_text().replace('"be"', '"bee"'))
    assert digest(first) != digest(second)


def test_a_repository_is_asked_for_its_file(tmp_path, monkeypatch):
    import huggingface_hub

    asked, file = [], saved(tmp_path / "tokenizer.json")

    def download(*arguments, **options):
        asked.append((arguments, options))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    dataset = prepared(tmp_path, "some/words")
    assert "some/words" in repr(asked)
    assert dataset.vocabulary[0] == "to"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **o: 1 / 0)
    with pytest.raises(DataError, match=r"'other/words' could not be loaded .*hub .*give a local tokenizer"):
        prepared(tmp_path, "other/words")


def test_a_run_takes_a_path_from_where_it_is_typed(tmp_path, cache, monkeypatch):
    saved(tmp_path / "made" / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    small = ["model.name=transformer", "model.layers=1", "model.width=8", "model.heads=2", "data.length=8"]
    small += ["partition.name=natural", "partition.clients=4", "cohort=2", "rounds=1", "local.epochs=1"]
    small += ["objective.name=language_model", "data.name=tiny_text", "tracking.enabled=false"]
    config = resolve("quickstart", [*small, "data.tokenizer=made", f"data.cache={cache}"])
    assert config.data.tokenizer == str(tmp_path / "made")
    run = run_inline(config, tmp_path / "run")
    assert Federation.of(config).dataset.vocabulary[-1] == "<boundary>"
    assert np.isfinite(run.lines[-1]["test/perplexity"])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, r"there is no file .*made/tokenizer.json on this node"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            "is no tokenizer of the library tokeniz",
        ),
    ],
)
def test_what_is_no_tokenizer_says_so(tmp_path, write, message):
    (tmp_path / "made").mkdir()
    write(tmp_path / "made")
    with pytest.raises(DataError, match=message) as raised:
        prepared(tmp_path, tmp_path / "made")
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match=r"there is no file .*nowhere.json on this node"):
        prepared(tmp_path, tmp_path / "nowhere.json")


def test_what_to_install_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"not installed here; install it \(pip install 'sparsyfed\[text\]'"):
        tokenizer_named("some/words", [])


def test_a_misspelt_name_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"data.tokenizer: found 'byte'; .* did you mean bytes"):
        resolve("quickstart", ["data.tokenizer=byte"])
