"""A workload in Flower's simulation: ``flower_app.py NAME SAMPLES ROUNDS WORKERS``, in its environment."""

from __future__ import annotations

import os
import time
import traceback

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.nn import functional as F
from workload import asked, report

client_app, server_app = ClientApp(), ServerApp()
WORKLOAD, ROUNDS, WORKERS = asked()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """The local epochs of plain SGD."""
    torch.set_num_threads(1)
    model = WORKLOAD.network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    optimizer = torch.optim.SGD(model.parameters(), lr=WORKLOAD.lr)
    for _ in range(WORKLOAD.epochs):
        for images, labels in WORKLOAD.batches(client):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    metrics = MetricRecord({"num-examples": WORKLOAD.samples})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """The rounds, evaluated centrally."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, marks, tested = WORKLOAD.network(), [], (0.0, 0.0)

    def evaluate(round_number: int, arrays: ArrayRecord) -> MetricRecord:
        nonlocal tested
        model.load_state_dict(arrays.to_torch_state_dict())
        tested = WORKLOAD.evaluate(model)
        marks.append(time.perf_counter())
        return MetricRecord({"accuracy": tested[0], "loss": tested[1]})

    strategy = FedAvg(
        fraction_train=WORKLOAD.cohort / WORKLOAD.clients,
        fraction_evaluate=0.0,
        min_available_nodes=WORKLOAD.clients,
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=ROUNDS,
        evaluate_fn=evaluate,  # before the first round too
    )
    report(marks, *tested)


if __name__ == "__main__":
    try:
        run_simulation(
            server_app=server_app,
            client_app=client_app,
            num_supernodes=WORKLOAD.clients,
            backend_config={
                "init_args": {"num_cpus": WORKERS, "include_dashboard": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    except RuntimeError:
        traceback.print_exc()
        os._exit(1)  # the server's thread would wait for clients for ever
