"""What a machine is doing, sampled every ten seconds under the names of MLflow's page of system metrics.

One process a machine samples for a run, whichever comes first: the driver where it is, elsewhere one of the
clients' actors, and after its end another. ``system.jsonl`` in the run's folder has the samples of all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

#: Seconds between two samples, as MLflow's own.
INTERVAL_S = 10.0

#: Where a run's samples lie, in its folder.
SAMPLES = "system.jsonl"

_MB = 1e6


def sample() -> dict[str, float]:
    """What this machine is doing now; of the CPU and the network since the last sample.

    Units: percentages and megabytes (10^6 bytes), of GPUs also watts. GPUs are seen where ``nvidia-ml-py``
    is installed (extra ``gpu``).
    """
    memory, disk, net = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / _MB,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_megabytes": disk.used / _MB,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / _MB,
    }
    if net is not None:  # some containers have no network
        found["network_receive_megabytes"] = net.bytes_recv / _MB
        found["network_transmit_megabytes"] = net.bytes_sent / _MB
    return found | _gpus()


def _gpus() -> dict[str, float]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no GPU
        return {}
    found: dict[str, float] = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        with suppress(pynvml.NVMLError):  # a partition of a GPU does not tell everything
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            found[f"gpu_{index}_memory_usage_megabytes"] = memory.used / _MB
            found[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
            found[f"gpu_{index}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            found[f"gpu_{index}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    return found


def record(folder: Path, numbers: Mapping[str, float], host: str = "") -> None:
    """Append a sample to a run's.

    Args:
        folder: The run's folder.
        numbers: The sample.
        host: Of another machine than the driver's, its name.
    """
    prefix = f"system/{host}/" if host else "system/"
    line = {"timestamp": time.time(), **{prefix + key: value for key, value in numbers.items()}}
    with open(folder / SAMPLES, "ab", buffering=0) as file:  # at once, as others append too
        file.write((json.dumps(line) + "\n").encode())


class Watch:
    """Samples this machine in a thread of its own, unless another process does so for the same run.

    Args:
        run: Names the run, the same for all of its processes.
        take: Called with each sample.
    """

    def __init__(self, run: str, take: Callable[[dict[str, float]], Any]) -> None:
        mark = hashlib.sha256(run.encode()).hexdigest()[:16]
        place = Path(tempfile.gettempdir()) / f"sparsyfed-watch-{os.geteuid()}-{mark}.lock"
        self._lock, self._take, self._over = FileLock(place, thread_local=False), take, threading.Event()
        self._thread = threading.Thread(target=self._work, name="sparsyfed-watch", daemon=True)

    def start(self) -> None:
        """Starts; returns at once."""
        self._claim()
        self._thread.start()

    def stop(self) -> None:
        """Ends within a moment."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(1.0)
        with suppress(OSError):
            self._lock.release(force=True)

    def _work(self) -> None:
        psutil.cpu_percent()  # the first one says nothing
        while not self._over.wait(INTERVAL_S):
            # Whatever goes wrong, a full disk or a driver that is gone, the run does not end for it.
            with suppress(Exception):
                if self._claim():
                    self._take(sample())

    def _claim(self) -> bool:
        """Whether this process is the one."""
        if not self._lock.is_locked:
            with suppress(Timeout, OSError):
                self._lock.acquire(timeout=0)
        return self._lock.is_locked
