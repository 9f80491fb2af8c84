"""A workload in pfl-research: ``torchrun --nproc_per_node WORKERS pfl_app.py NAME SAMPLES ROUNDS WORKERS``.

Its simulator divides a cohort among processes that torch.distributed joins, on CPUs by gloo.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn
from torch.nn import functional as F
from workload import asked, report


class Model(nn.Module):
    """A network with the two methods that pfl asks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, images: torch.Tensor, labels: torch.Tensor, eval: bool = False) -> torch.Tensor:
        """Mean cross-entropy."""
        self.eval() if eval else self.train()
        return F.cross_entropy(self.network(images), labels)

    @torch.no_grad()
    def metrics(self, images: torch.Tensor, labels: torch.Tensor, eval: bool = True) -> dict[str, Any]:
        """Accuracy and loss."""
        self.eval() if eval else self.train()
        outputs = self.network(images)
        return {
            "accuracy": Weighted((outputs.argmax(1) == labels).sum().item(), len(labels)),
            "loss": Weighted(F.cross_entropy(outputs, labels, reduction="sum").item(), len(labels)),
        }


class Clock(TrainingProcessCallback):
    """When training began and each round ended."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> Metrics:
        """See the base class."""
        self.marks.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(self, *args: Any, **kwargs: Any) -> tuple[bool, Metrics]:
        """See the base class."""
        self.marks.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    """The rounds, evaluated centrally after each."""
    workload, rounds, _ = asked()
    torch.set_num_threads(1)
    np.random.seed(0)
    torch.manual_seed(0)
    images, labels = workload.tensors("train")

    def user(client: int) -> Dataset:
        rows = workload.rows(client)
        return Dataset(raw_data=[images[rows], labels[rows]], user_id=str(client))

    # In turn: its other sampler may draw one user twice for a round.
    users = FederatedDataset(user, get_user_sampler("minimize_reuse", list(range(workload.clients))))
    module = Model(workload.network())
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    model = PyTorchModel(model=module, local_optimizer_create=torch.optim.SGD, central_optimizer=optimizer)
    test = Dataset(raw_data=list(workload.tensors("test")), eval_kwargs={"eval": True})
    evaluation = NNEvalHyperParams(local_batch_size=256)
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**9,  # users' own evaluation; the central one is a callback
            train_cohort_size=workload.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=users, val_data=users),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=workload.epochs,
            local_learning_rate=workload.lr,
            local_batch_size=workload.batch,
        ),
        model_eval_params=evaluation,
        callbacks=[CentralEvaluationCallback(test, model_eval_params=evaluation, frequency=1), clock],
    )
    if os.environ.get("RANK", "0") == "0":
        report(clock.marks, *workload.evaluate(module.network))
    sys.stdout.flush()
    os._exit(0)  # its sampling processes would hold the interpreter


if __name__ == "__main__":
    main()
