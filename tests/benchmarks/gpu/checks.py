"""The first part: what must hold on a GPU."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import torch

from tests.benchmarks.gpu.worker import Context, Found, Item, LeftOut
from tests.cluster.clients.cuda_checks import CHECKS, NeedsCuda


def items() -> list[Item]:
    """The device, then every check: of those made of every method, SparsyFed's first."""
    this = f"{__name__}:"
    names = sorted(CHECKS, key=lambda name: ":" in name and not name.endswith(": sparsyfed"))
    return [Item("device", "checks", f"{this}about")] + [
        Item(name, "checks", f"{this}check", {"name": name}, seconds=4.0) for name in names
    ]


def about(context: Context) -> Found:
    """The device, its driver and the libraries."""
    found: Found = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if context.device != "cuda":
        return {
            "device": f"{context.device} (a rehearsal: no figure of it says anything about GPUs)",
            **found,
        }
    about_it = torch.cuda.get_device_properties(0)
    return {
        "device": about_it.name,
        "memory GiB": round(about_it.total_memory / 2**30, 1),
        "multiprocessors": about_it.multi_processor_count,
        "compute capability": f"{about_it.major}.{about_it.minor}",
        "driver": _driver(),
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        **found,
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split()[0]


def check(context: Context, name: str) -> Found:
    """One check, in a folder of its own."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return {"found": CHECKS[name](torch.device(context.device), Path(folder))}
        except NeedsCuda as reason:
            raise LeftOut(str(reason)) from None
