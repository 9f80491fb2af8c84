"""Attacks on the resident model: on batches of a visit, and on rows of an evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from algorithms import Attack, Pixels
from cluster.clients.passes import Precision, arithmetic
from cluster.workload.objectives import Objective


class Adversary:
    """Finds inputs at which the objective's loss is larger.

    It looks for them in evaluation mode: batch statistics, dropout and pruned activations are training's own,
    and an attack neither sees nor moves them.

    Args:
        module: The model.
        objective: Whose loss is raised, whatever a method itself trains on.
        pixels: What pixel units are in the model's inputs.
    """

    def __init__(self, module: nn.Module, objective: Objective, pixels: Pixels) -> None:
        self._module, self._objective, self._pixels = module, objective, pixels

    def attacked(
        self,
        attack: Attack,
        inputs: Tensor,
        targets: Tensor,
        generator: torch.Generator,
        precision: Precision = "float32",
    ) -> tuple[Tensor, int]:
        """The attacked inputs, and how often the model was run for them: forward, and gradient of the inputs.

        Args:
            attack: How.
            inputs: A batch of model inputs, [n, ...].
            targets: Their targets.
            generator: The attack's randomness, on the CPU.
            precision: Arithmetic of the passes.
        """
        training, runs = self._module.training, 0

        def slope(at: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            at = at.detach().requires_grad_()
            with torch.enable_grad(), arithmetic(precision, at.device):
                loss = self._objective.loss(self._module(at), targets)
            (gradient,) = torch.autograd.grad(loss, at)
            return gradient

        self._module.eval()
        try:
            return attack.find(inputs, slope, self._pixels, generator).detach(), runs
        finally:
            self._module.train(training)

    def worst_outputs(
        self, attack: Attack, inputs: Tensor, targets: Tensor, restarts: int, generator: torch.Generator
    ) -> Tensor:
        """What the model returns under attack, of each sample the worst of several attacks, [n, ...]."""
        worst: Tensor | None = None
        for _ in range(restarts):
            found, _ = self.attacked(attack, inputs, targets, generator)
            with torch.no_grad():
                outputs = self._module(found)
                if worst is None:
                    worst = outputs
                    continue
                errors, before = (self._objective.errors(each, targets) for each in (outputs, worst))
                chosen = (errors > before).view(-1, *[1] * (outputs.ndim - 1))
                worst = torch.where(chosen, outputs, worst)
        assert worst is not None
        return worst
