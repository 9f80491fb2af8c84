"""What must hold on a GPU, as functions that the tests and ``sparsyfed bench gpu`` share.

Each takes the device and an empty folder and returns what it found in words; an ``AssertionError`` says what
does not hold. On the CPU they are rehearsed: a stand-in records passes, and the CPU is compared with itself.
What only CUDA can show raises :class:`NeedsCuda`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

from algorithms import Attack, registry
from algorithms.core.attacks import Pgd
from algorithms.core.layers import ActivationPruning
from cluster.clients.gpu import CONTEXT_BYTES, GpuError, GpuMemory
from cluster.clients.local_training import Trained
from cluster.clients.passes import set_up_cuda
from cluster.clients.transfers import Staging
from cluster.configuration.config import Config
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from cluster.workload import models
from tests.cluster.clients.tiny_visits import METHODS, play, trainer_of
from tests.tiny_experiment import asked_for, tiny_federation

#: Distance of a GPU's result from the CPU's after two rounds, over the distance that the model moved. Inputs
#: that are off by a part in a million change it by 1e-6, where a threshold falls on another value by 3e-4.
DEVICES_BOUND = 0.01

MIB = 2**20


class NeedsCuda(Exception):
    """The check has no meaning without CUDA."""


def graphs_equal_launched_passes(
    name: str, device: torch.device, folder: Path, attack: Attack | None = None
) -> str:
    """A method's visits with passes replayed as CUDA graphs, against the same passes launched one by one."""
    set_up_cuda()
    method, kind = METHODS[name], device.type
    # 16x16 pixels: of 8x8, one value a channel is left at the end, which BatchNorm refuses in a batch of one.
    tiny = models.build("resnet18", input_shape=(1, 16, 16), classes=3, seed=1, width=8)
    trainer = partial(trainer_of, method, kind, model=tiny, times=2, attack=attack or Attack())

    def launched() -> list[Trained]:
        return play(trainer(), method)

    replaying = trainer(cuda_graphs=True) if kind == "cuda" else trainer(recorded=[])
    expected = launched()
    differing = _distance(play(replaying, method), expected)
    if differing == 0:
        return "bit for bit"
    again = _distance(launched(), expected)
    assert again > 0, f"replayed visits differ by {differing:.1e}, launched ones repeat bit for bit"
    assert differing <= 10 * again, f"replayed visits differ by {differing:.1e}, launched ones by {again:.1e}"
    return f"differ by {differing:.1e}; so do launched passes from themselves, by {again:.1e}"


def the_device_agrees_with_the_cpu(algorithm: str, device: torch.device, folder: Path) -> str:
    """Two rounds in this process on the CPU and on the device; see :data:`DEVICES_BOUND`."""
    declared = {field.name for field in fields(registry()[algorithm])}
    options = {"sparsity": 0.7} if "sparsity" in declared else {}
    options |= {"draw_rounds": 1} if "draw_rounds" in declared else {}
    options |= {"bases": 2} if "bases" in declared else {}
    ends, start = [], None
    for kind in ("cpu", device.type):
        config = _config(folder, kind, algorithm={"name": algorithm, **options}, **asked_for(algorithm))
        driver = _driver(config, folder / f"on-{kind}-{len(ends)}")
        start = driver.state.weights.numpy().copy()
        driver.run()
        ends.append(driver.state.weights.numpy())
    moved = np.linalg.norm(ends[0] - start)
    distance = float(np.linalg.norm(ends[1] - ends[0]) / moved)
    zeros = float(np.mean((ends[0] == 0) != (ends[1] == 0)))
    found = f"differ by {distance:.1e} of the way moved, in {100 * zeros:.2g} % of the zeros"
    assert distance <= DEVICES_BOUND, f"CPU and {device.type} {found}; allowed is {DEVICES_BOUND:g}"
    return f"{found} (allowed: {DEVICES_BOUND:g})"


def thresholds_on_the_device_are_the_hosts(device: torch.device, folder: Path) -> str:
    """Activation thresholds that stay on the device, against numbers that the host reads."""
    generator, compared = torch.Generator().manual_seed(7), 0
    for density in (None, 0.01, 0.3, 1.0):
        for inputs in (
            torch.randn(16, 64, 8, 8, generator=generator),
            torch.relu(torch.randn(16, 64, 8, 8, generator=generator)),
            torch.randn(3, 5, 4, generator=generator).bfloat16(),
            torch.tensor([1.0, float("nan"), 2.0]),
            torch.zeros(4),
        ):
            weight = torch.randn(640, generator=generator)
            weight[: 0 if density == 1.0 else 600] = 0.0
            found = []
            for there in (torch.device("cpu"), device):
                pruning = ActivationPruning(density=density, every_batch=False, minimum_density=0.0)
                pruning.on_device = there is device
                found.append((float(pruning.threshold(inputs.to(there), weight.to(there))), pruning.kept))
            shape = tuple(inputs.shape)
            assert found[0] == found[1], f"density {density}, {shape}: {found[1]}, on the host {found[0]}"
            compared += 1
    return f"{compared} equal"


def a_small_share_is_refused(device: torch.device, folder: Path) -> str:
    """A share of the GPU that holds less than a client took is refused by name."""
    total = _gpu_bytes(device)
    held = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    try:
        GpuMemory((CONTEXT_BYTES + 64 * MIB) / total).check(client=3)
    except GpuError as error:
        said = str(error)
    else:
        raise AssertionError(f"{held.nbytes / MIB:.0f} MiB on a share with room for 64 were accepted")
    assert "raise gpus_per_actor" in said, said
    return said.partition(":")[0]


def a_share_is_capped(device: torch.device, folder: Path) -> str:
    """Beyond its share a process is refused memory by torch, and other memory of the GPU stays free."""
    total = _gpu_bytes(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    room = torch.cuda.memory_reserved() + 512 * MIB
    try:
        GpuMemory((CONTEXT_BYTES + room) / total).check(client=0)
        within = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
        try:
            beyond = torch.empty(1024 * MIB, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            del within
        else:
            raise AssertionError(
                f"{beyond.nbytes / MIB:.0f} MiB were handed out of a share with room for 512"
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    free, _ = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved()
    return f"refused; CUDA itself and other processes hold {context / MIB:.0f} MiB"


def pinned_buffers_take_turns(device: torch.device, folder: Path) -> str:
    """Copies through pinned memory: what was fetched lasts until the next fetch but one, sends do not mix."""
    _gpu_bytes(device)
    staging, size = Staging(), 1_000_003
    vectors = [torch.full((size,), float(value), device=device) for value in range(3)]
    first, second = staging.fetch(vectors[0]), staging.fetch(vectors[1])
    assert (first == 0).all(), "the first fetch changed with the second"
    assert (second == 1).all(), "the second fetch holds something else"
    third = staging.fetch(vectors[2])
    assert (third == 2).all(), "the third fetch holds something else"
    assert (second == 1).all(), "the second fetch changed with the third"
    for value in range(20):  # the host overwrites the buffer while the last copy may be under way
        staging.send(np.full(size, value, np.float32), vectors[value % 3])
        if value >= 2:
            older = vectors[(value - 2) % 3]
            assert bool((older == value - 2).all()), f"send {value - 2} was overwritten by a later one"
    return "fetches and sends keep their values"


def overlapped_uploads_change_nothing(device: torch.device, folder: Path) -> str:
    """One client's update crosses the wire while the next one trains, against one after the other."""
    config = _config(folder, device.type, cohort=6, algorithm={"name": "sparsyfed", "sparsity": 0.7})
    ends = []
    for name in ("overlapped", "one-by-one", "again"):
        driver = _driver(config, folder / name)
        if name == "one-by-one":
            driver.engine._host._sending = None
        driver.run()
        ends.append(driver.state.weights.numpy())
    return _same_bits(ends[0], ends[1], ends[2])


def a_run_resumes(device: torch.device, folder: Path) -> str:
    """A run that was stopped and resumed ends in the weights of one that was not."""
    config = _config(folder, device.type, rounds=4, algorithm={"name": "sparsyfed", "sparsity": 0.7})
    ends = []
    for name in ("whole", "again"):
        driver = _driver(config, folder / name)
        driver.run()
        ends.append(driver.state.weights.numpy())
    _driver(config.model_copy(update={"stop_after": 2}), folder / "in-two").run()
    resumed = Driver(RunFolder.open(folder / "in-two"), *_parts(config))
    assert resumed.state.round == 2, f"resumed after round {resumed.state.round}, not 2"
    resumed.run()
    return _same_bits(ends[0], resumed.state.weights.numpy(), ends[1])


#: What is checked -> the check.
CHECKS: dict[str, Callable[[torch.device, Path], str]] = {
    **{
        f"graphs equal launched passes: {name}": partial(graphs_equal_launched_passes, name)
        for name in METHODS
    },
    "graphs equal launched passes under attack": partial(
        graphs_equal_launched_passes, "fixed_mask", attack=Pgd(epsilon=0.1, steps=2)
    ),
    **{
        f"the GPU agrees with the CPU: {name}": partial(the_device_agrees_with_the_cpu, name)
        for name in registry()
    },
    "activation thresholds on the device": thresholds_on_the_device_are_the_hosts,
    "a share too small is refused": a_small_share_is_refused,
    "a share is capped": a_share_is_capped,
    "pinned buffers take turns": pinned_buffers_take_turns,
    "overlapped uploads change nothing": overlapped_uploads_change_nothing,
    "a run resumes": a_run_resumes,
}


# ------------------------------------------------------------------------------------------------ inside


def _gpu_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        raise NeedsCuda("needs CUDA")
    return torch.cuda.get_device_properties(device).total_memory


def _config(folder: Path, kind: str, **settings: object) -> Config:
    return tiny_federation(folder, gpus_per_actor=float(kind == "cuda"), **settings)


def _parts(config: Config) -> tuple[Federation, InlineEngine]:
    federation = Federation.of(config)
    return federation, InlineEngine(federation.setup())


def _driver(config: Config, folder: Path) -> Driver:
    return Driver(RunFolder.create(folder, config), *_parts(config))


def _distance(first: list[Trained], second: list[Trained]) -> float:
    """Largest difference of uploads, over their largest value; infinite where supports differ."""
    worst = 0.0
    for one, other in zip(first, second, strict=True):
        supports = [np.ones(0) if each.support is None else each.support for each in (one, other)]
        if not np.array_equal(*supports):
            return float("inf")
        worst = max(worst, float(np.abs(one.values - other.values).max() / np.abs(other.values).max()))
    return worst


def _same_bits(first: np.ndarray, second: np.ndarray, first_again: np.ndarray) -> str:
    """Whether two results are equal; where the first does not repeat itself, it is the device's kernels."""
    if np.array_equal(first, second):
        return "bit for bit"
    differing, again = (float(np.abs(other - first).max()) for other in (second, first_again))
    assert again > 0, f"differ by {differing:.1e}, and the same run again by nothing"
    return f"differ by {differing:.1e}; so does the same run again, by {again:.1e}"
