"""Crops and mirror images: what may come out, how often, for whom, and that nobody else notices."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

import cluster
from algorithms.fedavg import FedAvg
from algorithms.fedsam import FedSAM
from cluster.clients.augmentation import Augmentation
from cluster.configuration.config import resolve
from cluster.federation import Federation
from cluster.references import DataError
from tests.cluster.clients.test_passes import assert_equal_visits
from tests.cluster.clients.tiny_visits import broadcast_of, play, trainer_of
from tests.cluster.records.interrupted_runs import assert_same_run, drive, federated
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

AUGMENT = {"augment": {"crop": 2, "flip": True}}


def changes(image: np.ndarray, crop: int, flip: bool, black: float) -> dict[bytes, tuple[int, int, bool]]:
    """Every change of an image [C, H, W] that there is, written pixel by pixel."""
    height, width = image.shape[1:]
    found = {}
    for down in range(2 * crop + 1):
        for across in range(2 * crop + 1):
            for mirrored in (False, True) if flip else (False,):
                changed = np.full_like(image, black)
                for y in range(height):
                    for x in range(width):
                        from_y, from_x = y + down - crop, x + across - crop
                        if 0 <= from_y < height and 0 <= from_x < width:
                            changed[:, y, width - 1 - x if mirrored else x] = image[:, from_y, from_x]
                found[changed.tobytes()] = (down, across, mirrored)
    return found


@pytest.mark.parametrize(("crop", "flip"), [(1, True), (2, False), (0, True)])
@pytest.mark.parametrize(("stored", "black"), [(np.uint8, -1.0), (np.float32, 0.0)])
def test_every_image_is_changed_in_one_of_the_ways_and_all_ways_are_as_frequent(crop, flip, stored, black):
    images = np.random.default_rng(0).standard_normal((3, 2, 4, 5)).astype(np.float32)
    augmentation = Augmentation.of(crop, flip, np.dtype(stored))
    known = [changes(image, crop, flip, black) for image in images]
    seen: Counter[tuple[int, int, bool]] = Counter()
    for step in range(400):
        changed = augmentation.apply(torch.from_numpy(images), 7, step).numpy()
        seen.update(ways[one.tobytes()] for ways, one in zip(known, changed, strict=True))
    ways = (2 * crop + 1) ** 2 * (1 + flip)
    assert len(seen) == ways
    # 1,200 draws: each way within five deviations of its expected number.
    assert max(abs(count - 1200 / ways) for count in seen.values()) < 5 * (1200 / ways) ** 0.5


def test_what_is_drawn_follows_from_client_round_and_step_alone():
    images = torch.randn(8, 1, 6, 6)
    augmentation = Augmentation.of(2, True, np.dtype(np.uint8))
    once = augmentation.apply(images, 5, 3)
    assert torch.equal(once, augmentation.apply(images, 5, 3))
    assert not torch.equal(once, augmentation.apply(images, 5, 4))
    assert not torch.equal(once, augmentation.apply(images, 6, 3))
    method = FedAvg()
    in_turn, alone = (trainer_of(method, crop=2, flip=True) for _ in range(2))
    last = play(in_turn, method)[2]
    broadcast = broadcast_of(alone, method, None, 1)
    assert np.array_equal(alone.visit(2, np.arange(53, 61), 0.0, broadcast).values, last.values)
    assert not np.array_equal(alone.visit(1, np.arange(53, 61), 0.0, broadcast).values, last.values)


def test_a_recorded_pass_gets_a_new_change_every_time():
    method, recorded = FedAvg(), []
    expected = play(trainer_of(method, crop=2, flip=True), method)
    assert_equal_visits(play(trainer_of(method, recorded=recorded, crop=2, flip=True), method), expected)
    assert len(recorded) >= 2
    plain = play(trainer_of(method), method)
    assert not np.array_equal(plain[0].values, expected[0].values)


def test_both_passes_of_a_step_see_the_same_images():
    method, seen = FedSAM(), []
    trainer = trainer_of(method, crop=2, flip=True)
    compute = trainer._compute

    def noting(inputs, targets):
        seen.append(inputs.clone())
        return compute(inputs, targets)

    trainer._passes._compute = noting
    trainer.visit(0, np.arange(8), 0.0, broadcast_of(trainer, method, None, 1))  # one batch, two epochs
    first, again, second, _ = seen
    assert torch.equal(first, again)
    assert not torch.equal(first.sort(0).values, second.sort(0).values)


def test_none_is_none():
    assert Augmentation.of(0, False, np.dtype(np.uint8)) is None
    plain = resolve("quickstart").digest()
    assert resolve("quickstart", ["local.augment.crop=0", "local.augment.flip=false"]).digest() == plain
    changed = {resolve("quickstart", [f"local.augment.{each}"]).digest() for each in ("crop=1", "flip=true")}
    assert len({plain, *changed}) == 3


def test_interrupted_is_uninterrupted(cache, tmp_path):
    from cluster.records.run_folder import RunFolder

    federation = Federation.of(federated(cache, local=AUGMENT))
    whole = RunFolder.create(tmp_path / "whole", federation.config)
    drive(whole, federation)
    cut = RunFolder.create(tmp_path / "cut", federation.config)
    drive(cut, federation, killed_at=3)
    drive(cut, federation)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.ray
def test_actors_end_in_the_same_bits(cache, tmp_path):
    inline = tiny_federation(cache, local=AUGMENT)
    cluster.run(inline, tmp_path / "inline")
    cluster.run(tiny_federation(cache, local=AUGMENT, execution="ray", actors=2), tmp_path / "ray")
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ray", "inline"))
    assert found == expected


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["data.name=breast_cancer", "model.name=linear", "local.augment.flip=true"],
         r"local.augment: crop 0, flip true, but .*data.name = 'breast_cancer' have shape \[30\]"),
        (["local.augment.crop=8"], "crop: 8 pixels around images of 8x8; allowed are fewer than 8"),
    ],
)  # fmt: skip
def test_what_is_refused(cache, overrides, match):
    with pytest.raises(DataError, match=match):
        Federation.divided(resolve("quickstart", [f"data.cache={cache}", *overrides]))
