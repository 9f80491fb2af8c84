"""A workload in BlazeFL: ``blazefl_app.py processes|threads NAME SAMPLES ROUNDS WORKERS``."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from blazefl.contrib import (
    FedAvgBaseServerHandler,
    FedAvgProcessPoolClientTrainer,
    FedAvgThreadPoolClientTrainer,
)
from workload import Workload, asked, report


class Batches:
    """What the trainers ask a data loader for."""

    def __init__(self, workload: Workload, client: int | None, generator: torch.Generator) -> None:
        self.dataset = range(workload.test if client is None else workload.samples)
        self._workload, self._client, self._generator = workload, client, generator

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One epoch of the client, or the test split."""
        if self._client is None:
            return self._workload.test_batches()
        return self._workload.batches(self._client, self._generator)


class Clients:
    """BlazeFL's model selector and partitioned dataset."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def select_model(self, name: str) -> torch.nn.Module:
        """The workload's model."""
        return self._workload.network()

    def get_dataloader(
        self, type_: str, cid: int | None, batch_size: int | None, generator: torch.Generator
    ) -> Batches:
        """Batches from the tensors that this process holds."""
        return Batches(self._workload, cid, generator)

    def set_dataset(self, type_: str, cid: int | None, dataset: Any) -> None:
        """Nothing is kept between visits."""


def main() -> None:
    """The rounds, evaluated centrally after each."""
    workload, rounds, workers = asked()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    workload.tensors("train"), workload.tensors("test")  # forked processes inherit them
    clients = Clients(workload)
    common: dict[str, Any] = {"model_selector": clients, "model_name": "", "dataset": clients, "seed": 0}
    common |= {"device": "cpu", "num_clients": workload.clients, "batch_size": workload.batch}
    handler = FedAvgBaseServerHandler(
        global_round=rounds, sample_ratio=workload.cohort / workload.clients, **common
    )
    common |= {"epochs": workload.epochs, "lr": workload.lr, "num_parallels": workers}
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = (
            FedAvgThreadPoolClientTrainer(**common)
            if sys.argv[1] == "threads"
            else FedAvgProcessPoolClientTrainer(state_dir=Path(folder), **common)
        )
        trainer.progress_fn = lambda jobs: jobs  # no bar
        marks, summary = [time.perf_counter()], {}
        while not handler.is_stopped():
            sampled = handler.sample_clients()
            trainer.local_process(handler.downlink_package(), sampled)
            for package in trainer.uplink_package():
                handler.load(package)
            summary = handler.get_summary()
            marks.append(time.perf_counter())
    report(marks, summary["server_acc"], summary["server_loss"])


if __name__ == "__main__":
    # A pool starts anew every round: forking is its fastest way, and where nothing is on a GPU a safe one.
    multiprocessing.set_start_method("fork")
    main()
