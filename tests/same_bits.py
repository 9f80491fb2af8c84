"""Whether two versions of the code end in the same models, bit for bit.

    python -m tests.same_bits COMMIT          # COMMIT against the working tree, on this machine
    python -m tests.same_bits --record        # tests/hashes.json, which the suite compares with

Some twenty short runs: every method, on Ray and inline, buffered, tiers, a shift, server optimizers, a lossy
wire. Each version runs in a process and from a folder of its own. Run it before and after a refactoring.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

COMMON = (
    "rounds=3", "evaluate_every=3", "cohort=4", "partition.clients=8", "local.epochs=1",
    "local.batch_size=32", "model.channels=[4,8]", "model.hidden=16", "model.groups=2", "execution=inline",
    "tracking.enabled=false",
)  # fmt: skip
_TIERS = "devices.tiers={a: {share: 0.5, sparsity: 0.8}, b: {share: 0.5, sparsity: 0.95}}"
_BUFFERED = (
    "schedule.name=buffered", "schedule.buffer=2", "schedule.concurrency=4", "devices.profile=phones",
)  # fmt: skip

#: What is run: overrides of the preset ``quickstart`` by name.
CASES: dict[str, tuple[str, ...]] = {
    "fedavg": ("algorithm.name=fedavg",),
    "topk": ("algorithm.name=topk",),
    "sparsyfed": (),
    "sparsyfed every batch": ("algorithm.threshold=every_batch", "algorithm.beta=1.5"),
    "sparsyfed spectral": ("algorithm.exponent=spectral",),
    "sparsyfed plain layers": ("algorithm.plain_layers=['0']", "algorithm.threshold=first_batch_conv"),
    "zerofl": ("algorithm.name=zerofl", "algorithm.sparsity=0.75"),
    "zerofl differences": ("algorithm.name=zerofl", "algorithm.upload=top_k_weights_diff"),
    "flash": ("algorithm.name=flash", "algorithm.warmup_epochs=2"),
    "flash sensitivity": (
        "algorithm.name=flash", "algorithm.stage1=sensitivity", "algorithm.init_fraction=0.5",
        "algorithm.init_epochs=2", "algorithm.refresh_interval=2", "algorithm.averaging=masked",
    ),
    "feddst": (
        "algorithm.name=feddst", "algorithm.readjust_interval=1", "algorithm.readjust_fraction=0.25",
        "rounds=4",
    ),
    "fixed_mask": ("algorithm.name=fixed_mask",),
    "fedsam": ("algorithm.name=fedsam",),
    "fedadam": ("algorithm.name=topk", "server.name=fedadam"),
    "momentum": ("algorithm.name=fixed_mask", "server.momentum=0.9"),
    "proximal and decay": ("local.proximal=0.1", "local.weight_decay=0.001", "local.lr_final=0.05"),
    "batch norm": ("model.norm=batch", "model.name=small_cnn"),
    "buffered": ("algorithm.name=topk", *_BUFFERED),
    "tiers": ("algorithm.name=sparsyfed", "algorithm.sparsity=0.8", _TIERS),
    "deadline": ("devices.profile=phones", "schedule.over_selection=1.5", "schedule.deadline=20"),
    "shift": ("shift.round=2", "shift.partition={alpha: 0.1}"),
    "lossy wire": ("wire.uplink=int8", "wire.downlink=float16"),
    "validation": ("data.validation=0.2", "partition.name=dirichlet"),
    "ray": ("execution=ray", "actors=2"),
    "ray feddst": (
        "execution=ray", "actors=2", "algorithm.name=feddst", "algorithm.readjust_interval=1",
        "algorithm.readjust_fraction=0.25", "rounds=4",
    ),
}  # fmt: skip


def final_model(overrides: tuple[str, ...], folder: Path) -> str:
    """Run a case in the new folder ``folder``; the hash of its model."""
    import cluster

    merged = {override.partition("=")[0]: override for override in (*COMMON, *overrides)}
    cluster.run(cluster.resolve("quickstart", list(merged.values())), folder)
    return hash_of(folder)


def hash_of(run: Path) -> str:
    """The SHA-256 of the tensors in a run's model file."""
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(run / "model.safetensors").items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()[:16]


def machine() -> str:
    """What bits depend on beside the code: torch, the instruction set, and the CPU that its libraries see."""
    import torch

    file = Path("/proc/cpuinfo")
    described = file.read_text(encoding="utf-8") if file.exists() else ""
    # The name of a virtual machine's CPU hides its generation.
    kind = re.findall(r"^(vendor_id|cpu family|model)\s*:\s*(.+)$", described, re.MULTILINE)[:3]
    cpu = " ".join(value for _, value in kind) or platform.processor()
    return f"torch {torch.__version__.partition('+')[0]}, {torch.backends.cpu.get_cpu_capability()}, {cpu}"


def _of(tree: Path, names: list[str]) -> dict[str, str]:
    """Final models of some cases by the code in ``tree``; an error's last line where one cannot run."""
    environment = os.environ | {"PYTHONPATH": str(tree), "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            # -P: beside this file lies tests/cluster, which is not meant.
            [sys.executable, "-P", __file__, "--hashes", folder, *names],
            cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    found = {}
    for number, name in enumerate(names):
        try:
            found[name] = final_model(CASES[name], folder / str(number))
        except Exception as error:
            found[name] = f"cannot run: {str(error).splitlines()[-1][:80]}"
    return found


def main() -> int:
    """Compare, record, or (in a process of its own) compute."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.same_bits", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("commit", nargs="?", help="what to compare the working tree with")
    parser.add_argument("--record", action="store_true", help="write the hashes of this machine's kind")
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=CASES, default=list(CASES))
    parser.add_argument("--hashes", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.hashes:
        print(json.dumps(_hashes(Path(asked.hashes[0]), asked.hashes[1:])))
        return 0
    if (asked.commit is None) == (not asked.record):
        parser.error("name a commit, or --record")
    here = _of(ROOT, asked.only)
    if asked.record:
        recorded = ROOT / "tests" / "hashes.json"
        known = json.loads(recorded.read_text(encoding="utf-8")) if recorded.is_file() else {}
        known[machine()] = known.get(machine(), {}) | here
        recorded.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", asked.commit], stdout=subprocess.PIPE, check=True
        ).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        there = _of(Path(folder), asked.only)
    differing = [name for name in asked.only if here[name] != there[name]]
    for name in asked.only:
        print(f"{'DIFFERS' if name in differing else 'same':8} {name:24} {there[name]} {here[name]}")
    print(f"{len(differing)} of {len(asked.only)} differ from {asked.commit}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
