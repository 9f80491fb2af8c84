"""What `sparsyfed describe` says is what the declarations, the data and the encoder say."""

import os
from pathlib import Path

import pytest

from algorithms import hyperparameters, registry
from cluster.cli import main
from cluster.command_line.describe_choice import choice_asked
from cluster.configuration.config import resolve
from cluster.federation import Federation
from cluster.transport import wire


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def described(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["describe", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", list(registry()))
def test_a_method_is_described_from_its_declaration(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = described(capsys, name)
    method = registry()[name]
    assert text.startswith(f"{name}\n")
    assert f"sparsyfed run algorithm.name={name}" in text
    assert method.paper.split(",")[0] in text
    rows = [row.split() for row in text.splitlines()]
    for parameter in hyperparameters(method):
        assert any(row[:1] == [parameter.name] for row in rows), parameter.name


def test_a_hyperparameter_shows_range_default_and_search(capsys: pytest.CaptureFixture[str]) -> None:
    text = described(capsys, "sparsyfed")
    (beta,) = [row for row in text.splitlines() if row.split()[:1] == ["beta"]]
    assert beta.split()[:8] == ["beta", "1.25", "1", "to", "4", "1", "to", "2"]
    for choice in (
        "first_batch",
        "every_batch",
        "first_batch_conv",
        "arXiv 2504.05153",
        "algorithms/sparsyfed.py",
    ):
        assert choice in text  # fmt: skip


def test_a_method_of_ones_own_and_names_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own_method.py").write_text(
        "from dataclasses import dataclass\n"
        "from algorithms import Algorithm, hyperparameter\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Own(Algorithm):\n"
        "    '''A method of one's own.'''\n"
        "    gamma: float = hyperparameter(0.01, 'its only knob', low=0.001, high=1.0, log=True)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = described(capsys, "own_method:Own")
    assert "A method of one's own." in text
    assert "0.001 to 1, log" in text
    assert choice_asked(["quickstart"]) is None
    assert main(["describe", "own_method:Owm"]) == 2
    assert "has no 'Owm'; did you mean Own?" in capsys.readouterr().err
    assert main(["describe", "spasyfed"]) == 2


def test_quickstart_is_described_with_model_partition_bytes_and_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = described(capsys)
    # small_cnn on 1x8x8: 1*64*9 + 64*128*9 + 512*256 + 256*10 = 576 + 73728 + 131072 + 2560 = 207,936
    assert "207,936" in text
    # K = round((1 - 0.9) * 207,936)
    assert "20,794 of |P|" in text
    # The last layer multiplies and adds 256 * 10 times: 5,120 FLOPs.
    (last,) = [row for row in text.splitlines() if row.split()[:2] == ["11", "10x256"]]
    assert last.split()[-1] == "5"
    # 1,437 digits over 30 clients: 47 each, 27 left over.
    assert "47 / 47 / 47 samples" in text
    assert "given to nobody 27" in text
    assert "{name: lda, clients: 30, seed: 1337, alpha: 0.5, order: clients}" in text
    assert "beta: 1.25" in text  # a default of the method, not written in the preset
    assert "two float64[size]" in text
    # 4 (20,794 + 650) bytes of values, and |P| H2(0.1) = 207,936 * 0.469 bits of positions: 85,776 + 12,190.
    (upload,) = [row for row in text.splitlines() if "upload of the top K, float32" in row]
    assert upload.split()[-5:] == ["0.098", "MB", "0.98", "MB", "8.5x"]
    assert os.listdir() == []


def test_what_private_models_will_have_told(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dp_accounting", reason="epsilon is composed by dp-accounting, the extra dp")
    small = ("model.name=mlp", "model.hidden=[8]", "algorithm.name=fixed_mask", "sampler.name=poisson")
    shown = described(capsys, "quickstart", *small, "privacy.dp.clip=0.5", "privacy.dp.noise_multiplier=1")
    assert "privacy  of a whole client, by 10 coins of 30" in shown
    assert "epsilon     15.4 after 30 rounds, at delta 1e-05, by rdp" in shown
    assert "a round in 1.92e+05 has no update" in shown  # (2/3)^-30
    assert "privacy  " not in described(capsys, "quickstart", *small)


def test_what_is_prunable_and_what_is_not_is_told_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("model.name=vit", "model.width=8", "model.patch=2", "model.layers=1")
    shown = described(capsys, "quickstart", *small)
    assert [line.split()[0] for line in shown.splitlines() if line.strip().startswith("blocks.0.")] == [
        *(f"blocks.0.attention.{name}" for name in ("query", "key", "value", "output")),
        "blocks.0.feed1",
        "blocks.0.feed2",
    ]
    assert "among them places.weight (136)" in shown  # a class token and 16 patches, 8 wide


def test_the_bytes_are_those_of_the_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.name=mlp", "algorithm.name=fedavg", "wire.downlink=float16"]
    text = described(capsys, *words, "--picture", "new/here.svg")
    # mlp on 64 pixels: 64*200 + 200 + 200*10 + 10 = 15,010 floats.
    federation = Federation.of(resolve(None, words))
    assert federation.layout.size == 15_010
    assert wire.dense_bytes(wire.Shape.of(federation.layout)) == 60_040
    rows = {row.split("  ")[0].strip(): row.split() for row in text.splitlines()}
    assert rows["dense float32 model"][-5:] == ["0.060", "MB", "0.60", "MB", "1.0x"]
    # Dense values as float16 take half: 30,020 bytes and a header.
    assert rows["download in round 1, float16"][-5:] == ["0.030", "MB", "0.30", "MB", "2.0x"]
    assert Path("new/here.svg").read_text().lstrip().startswith("<?xml")
    assert "new/here.svg" in text


def test_what_travels_beside_the_model_and_what_clients_keep(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.name=mlp", "partition.clients=20", "algorithm.name=scaffold"]
    text = " ".join(described(capsys, *words).split())
    # c is as long as the model, 15,010 floats; each of 20 clients keeps one.
    assert "scaffold carries beside the model: c (15,010 floats)" in text
    assert "a client keeps 0.060 MB between its visits" in text
    assert "in the driver's memory at most 1.2 MB" in text
    assert "dense float32 model 0.060 MB 0.60 MB 1.0x" in text
    assert "download in round 1, float32 0.120 MB 1.20 MB 0.5x" in text


def test_what_a_tiers_part_takes_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """An mlp 64-20-10 at half of its width: 64 x 10 + 10 x 10 weights, 10 + 10 biases: 760 floats."""
    model = ["model={name: mlp, hidden: [20]}", "data.name=digits", "local.batch_size=8"]
    tiers = "devices.tiers={whole: {share: 0.5, sparsity: 0.0}, half: {share: 0.5, sparsity: 0.5}}"
    words = [*model, tiers, "algorithm={name: heterofl, sparsity: 0.0, share_of: width}"]
    rows = {
        row.split()[0]: row.split()
        for row in described(capsys, *words).splitlines()
        if "% " in row and "MB" in row
    }
    # Forward and weight gradient, of the last layer also the input gradient: 4 * 640 + 6 * 100 FLOPs.
    assert rows["half"][:2] == ["half", "50.0%"]
    assert [float(word) for word in rows["half"][2:8:2]] == [0.003, 0.003, 0.0]
    federation = Federation.of(resolve(None, words))
    assert federation.flops.dense(1) == 4 * 1280 + 6 * 200
    # Weights and gradient; a batch of 8 leaves 64 (flat), 10, 10 (ReLU) and 10 values.
    assert federation.tier_bytes("half") == 4 * (2 * 760 + 8 * (64 + 10 + 10 + 10))
    assert federation.tier_bytes("whole") == federation.training_bytes == 4 * (2 * 1510 + 8 * (64 + 50))
    unknown = described(capsys, *model, tiers, "algorithm={name: fiarse, sparsity: 0.0}")
    row = next(row.split() for row in unknown.splitlines() if row.split()[:1] == ["half"] and "MB" in row)
    assert row[1] == "51.0%"  # 755 of 1,480: half of weights and biases, which are 0 at first


def test_the_drawn_partition_is_the_partition(capsys: pytest.CaptureFixture[str]) -> None:
    text = described(capsys, "partition.name=shards", "partition.shards_per_client=1", "partition.clients=10")
    rows = [row for row in text.splitlines() if row[:2] in {f"{digit} " for digit in range(10)}]
    federation = Federation.of(
        resolve(None, ["partition.name=shards", "partition.shards_per_client=1", "partition.clients=10"])
    )
    histogram = federation.partition.class_histogram(federation.dataset.train.targets, 10)
    drawn = [[cell != " " for cell in row[2:12].ljust(10)] for row in rows]
    assert drawn == (histogram.T > 0).tolist()


def test_a_config_that_cannot_run_is_refused_before_a_picture_is_drawn(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["describe", "partition.clients=5000", "cohort=1", "--picture", "here.png"]) == 2
    assert "partition.clients = 5000" in capsys.readouterr().err
    assert os.listdir() == []


def test_an_upload_of_words_has_their_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """Three words of 48 bits for every two floats of 32, the same positions, and who pays dense."""
    sizes = {}
    for grid in ("exact", "48"):
        text = described(capsys, "quickstart", "algorithm.name=fixed_mask", f"wire.grid={grid}")
        (row,) = [line for line in text.splitlines() if line.lstrip().startswith("upload of the top K")]
        sizes[grid] = float(row.split(" MB")[0].split()[-1])
    assert "48 bits a value" in row
    assert 1.3 < sizes["48"] / sizes["exact"] < 1.5
    text = described(capsys, "quickstart", "privacy.secure.masks=billed", "wire.grid=32")
    assert "sparsyfed pays dense, " in text
    assert "7 of 10 clients unmask a sum" in text
