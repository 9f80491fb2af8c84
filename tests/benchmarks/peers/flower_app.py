"""The workload in Flower's simulation: ``flower_app.py ROUNDS WORKERS``, in Flower's environment."""

from __future__ import annotations

import os
import sys
import time

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))

import torch
import workload
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.nn import functional as F

client_app, server_app = ClientApp(), ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One local epoch of plain SGD."""
    torch.set_num_threads(1)
    model = workload.small_cnn()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = _data()
    partition = int(context.node_config["partition-id"])
    rows = torch.arange(partition * workload.SAMPLES, (partition + 1) * workload.SAMPLES)
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.LR)
    for chosen in rows[torch.randperm(len(rows))].split(workload.BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(rows)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


_kept: list[torch.Tensor] = []


def _data() -> list[torch.Tensor]:
    if not _kept:
        _kept.extend(workload.tensors("train"))  # once a worker
    return _kept


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """The rounds, evaluated centrally."""
    torch.set_num_threads(1)
    model, marks = workload.small_cnn(), []
    images, labels = workload.tensors("test")

    def evaluate(round_number: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        with torch.no_grad():
            accuracy = (model(images).argmax(1) == labels).double().mean()
        marks.append(time.perf_counter())
        return MetricRecord({"accuracy": float(accuracy)})

    strategy = FedAvg(
        fraction_train=workload.COHORT / workload.CLIENTS,
        fraction_evaluate=0.0,
        min_available_nodes=workload.CLIENTS,
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=int(sys.argv[1]),
        evaluate_fn=evaluate,
    )
    workload.report([later - earlier for earlier, later in zip(marks, marks[1:])])  # noqa: B905, RUF007


if __name__ == "__main__":
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=workload.CLIENTS,
        backend_config={
            "init_args": {"num_cpus": int(sys.argv[2]), "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
