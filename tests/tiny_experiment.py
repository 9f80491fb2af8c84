"""The tiny experiment that product and reference are compared on, the product's run of it, and comparisons.

The product's run keeps every update as the server decoded it, so that a run can be compared with another one
or with the naive reference (:mod:`tests.naive`), upload by upload.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from algorithms import ServerState
from cluster.configuration.config import Config, resolve
from cluster.configuration.trees import merge
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine

if TYPE_CHECKING:
    from tests.naive import NaiveFederation

Weights = dict[str, Tensor]
Mask = dict[str, Tensor]

# ------------------------------------------------------------------------------------ the tiny experiment


def tiny_images() -> dict[str, np.ndarray]:
    """120 training and 60 test images of 8x8 pixels: three random patterns under heavy noise."""
    rng = np.random.default_rng(20240)
    patterns = rng.integers(60, 196, size=(3, 8, 8))
    arrays = {}
    for split, count in (("train", 120), ("test", 60)):
        labels = rng.integers(0, 3, size=count)
        noisy = patterns[labels] + rng.normal(0.0, 45.0, size=(count, 8, 8))
        arrays[f"{split}_images"] = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
        arrays[f"{split}_labels"] = labels.astype(np.int64)
    return arrays


def tiny_model(*, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A strided convolution, a grouped one and two linear layers: 36 + 36 + 256 + 48 prunable weights."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, classes),
    )


def tiny_federation(tmp_path: Path, **overrides: Any) -> Config:
    """A real configuration small enough for a test: 6 clients of unequal size, 4 a round, 2 rounds, inline.

    Args:
        tmp_path: Where the decoded data goes (``tmp_path / "data"``).
        overrides: Top-level keys. A mapping is merged into its section (``local={"epochs": 2}``), except
            ``algorithm``, ``model`` and ``server``, which it replaces.
    """
    tree: dict[str, Any] = {
        "rounds": 2,
        "cohort": 4,
        "seed": 3,
        "execution": "inline",
        "algorithm": {"name": "fedavg"},
        "model": {"name": "small_cnn", "channels": [4, 6], "hidden": 16, "norm": "group", "groups": 2},
        "data": {"name": "tests.tiny_experiment:tiny_images", "cache": str(tmp_path / "data")},
        "partition": {"name": "dirichlet", "clients": 6, "alpha": 1.0, "seed": 5},
        "local": {"epochs": 1, "batch_size": 8, "lr": 0.2},
        "tracking": {"enabled": False},
    }
    for key, value in overrides.items():
        merged = isinstance(value, dict) and key in tree and key not in ("algorithm", "model", "server")
        tree[key] = merge(tree, {key: value})[key] if merged else value
    return resolve(tree)


def asked_for(method: str) -> dict[str, Any]:
    """Overrides without which a method refuses the tiny experiment."""
    if method == "ma_echo":
        return {"rounds": 1, "cohort": 6}
    if method in ("masha1", "masha2", "sgda"):
        return {"model": {"name": "linear", "perturbation": True}}
    return {}


# --------------------------------------------------------------------------------------- the real product


@dataclass
class InlineRun:
    """What the product made of a configuration.

    Attributes:
        weights: The final server weights by name (w, not theta), views of ``state.weights``.
        lines: The lines of ``rounds.jsonl``.
        uploads: (round, client) -> (weights by name as the server decoded them, support by name or None).
        states: Server state after each round, the initial one first.
        driver: The driver, for anything else.
    """

    weights: Weights
    lines: list[dict[str, Any]]
    uploads: dict[tuple[int, int], tuple[Weights, Mask | None]]
    states: list[ServerState]
    driver: Driver

    @property
    def state(self) -> ServerState:
        """The final server state."""
        return self.states[-1]


def run_inline(config: Config, folder: Path) -> InlineRun:
    """Run ``config`` in this process, in the new folder ``folder``; records every update that was folded."""
    federation = Federation.of(config)
    engine = InlineEngine(federation.setup())
    layout = federation.layout
    uploads: dict[tuple[int, int], tuple[Weights, Mask | None]] = {}
    host, states = engine._host, []
    fold = host._uplink.fold

    def recording_fold(total: Any, client: int, received: Any, *rest: Any) -> Any:
        if isinstance(received, np.ndarray):  # masked words tell nothing
            return fold(total, client, received, *rest)
        values = layout.split(torch.from_numpy(received.values.copy()))
        support = received.support
        by_name = None if support is None else layout.split(torch.from_numpy(support.copy()), layout.prunable)
        uploads[host._round, client] = (values, by_name)
        return fold(total, client, received, *rest)

    host._uplink.fold = recording_fold
    driver = Driver(
        RunFolder.create(folder, config), federation, engine, should_stop=lambda: states.append(driver.state)
    )
    driver.run()
    if states[-1] is not driver.state:
        states.append(driver.state)
    return InlineRun(layout.split(driver.state.weights), driver.folder.rounds(), uploads, states, driver)


# -------------------------------------------------------------------------------------------- comparisons


def assert_same(
    product: InlineRun, reference: NaiveFederation, *, atol: float = 2e-6, rtol: float = 1e-5
) -> None:
    """Every upload and the final weights agree within float tolerance; supports and zeros agree exactly."""
    assert product.uploads.keys() == reference.uploads.keys()
    for key in sorted(reference.uploads):
        (values, support), (expected, mask) = product.uploads[key], reference.uploads[key]
        where = f"round {key[0]}, client {key[1]}"
        assert (support is None) == (mask is None), f"{where}: support {support is None}, mask {mask is None}"
        if mask is not None and support is not None:
            for name in mask:
                assert torch.equal(support[name], mask[name]), f"{where}: support of {name}"
        _assert_close(values, expected, where, atol, rtol)
    _assert_close(product.weights, reference.history[-1], "final weights", atol, rtol)
    for name in reference.prunable:
        zeros = reference.history[-1][name] == 0
        assert torch.equal(product.weights[name] == 0, zeros), f"final zeros of {name}"


def assert_identical(first: InlineRun, second: InlineRun) -> None:
    """Two runs of the product end in the same bits."""
    assert first.weights.keys() == second.weights.keys()
    for name, tensor in first.weights.items():
        assert tensor.numpy().tobytes() == second.weights[name].numpy().tobytes(), name


def _assert_close(found: Weights, expected: Weights, where: str, atol: float, rtol: float) -> None:
    assert found.keys() == expected.keys(), where
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{where}: {n}: {m}"
        )
