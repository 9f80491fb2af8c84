"""MA-Echo: one round; the server moves all models towards each other where their own data do not notice.

Su, Li, Xue, "One-shot Federated Learning without Server-side Training", Neural Networks 2023, arXiv
2204.12493. Beside its model a client sends, a layer, the matrix P that projects off the inputs that it has
met: W_i may move along P without harm to the client's own data. Clients need not share a class, nor even
an initialisation. Biases are one more column of W, whose input is 1; norms and buffers are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.parameters import Carried, Entry, ParameterLayout, prunable_layers


class MaEchoClient(Client):
    """Trains from an initialisation of its own; then looks at its data once more, layer by layer."""

    method: MaEcho

    def begin(self) -> None:
        """Weights anew from the client's generator, of variance 1 / fan-in; their biases are 0."""
        super().begin()
        visit = self.visit
        if not self.method.own_initialisation:
            return
        for weight, bias in layers_of(visit.layout):
            drawn = visit.rng.standard_normal(weight.size) / (weight.size / weight.shape[0]) ** 0.5
            visit.weights[weight.span] = torch.from_numpy(drawn).to(visit.weights)
            if bias is not None:
                visit.weights[bias.span] = 0.0

    def finish(self) -> Tensor | None:
        """Send the upper triangle of each layer's P, and which classes the client has two rows of."""
        support = super().finish()
        visit, carried = self.visit, self.visit.carried
        layers = layers_of(visit.layout)[:-1]
        modules = {f"{name}.weight": layer for name, layer in prunable_layers(visit.module).items()}
        projections = [torch.eye(width(*layer), dtype=torch.float64) for layer in layers]
        seen: dict[str, Tensor] = {}
        handles = [
            modules[weight.name].register_forward_pre_hook(
                lambda layer, inputs, name=weight.name: seen.update({name: inputs[0]})
            )
            for weight, _ in layers
        ]
        visit.module.eval()
        shuffled = torch.from_numpy(visit.rng.permutation(len(visit.targets))).to(visit.weights.device)
        with torch.no_grad():
            for rows in shuffled.split(visit.batch_size):
                visit.module(visit.inputs[rows])
                for (weight, bias), projection in zip(layers, projections, strict=True):
                    met = self._met(modules[weight.name], seen[weight.name], bias is not None)
                    ridge = self.method.ridge if len(weight.shape) == 2 else self.method.ridge_conv
                    narrow(projection, met.double().cpu(), ridge, self.method.damping)
        for handle in handles:
            handle.remove()
        visit.module.train()
        for (weight, _), projection in zip(layers, projections, strict=True):
            carried[f"projection.{weight.name}"].copy_(projection[_triangle(len(projection))])
        counts = torch.bincount(visit.targets.long(), minlength=len(carried["classes"]))
        carried["classes"].copy_(counts[: len(carried["classes"])] > 1)
        return support

    def _met(self, layer: nn.Module, inputs: Tensor, bias: bool) -> Tensor:
        """The batch's mean input, [rows, fan-in (+ 1)]: of a convolution the patches of the mean map."""
        if isinstance(layer, nn.Conv2d):
            # With stride 2 and without padding, whatever the layer has, as in the authors' code.
            rows = F.unfold(inputs.mean(0, keepdim=True), layer.kernel_size, stride=2)[0].T
        else:
            rows = inputs.reshape(-1, inputs.shape[-1]).mean(0, keepdim=True)
        return torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if bias else rows


def narrow(projection: Tensor, rows: Tensor, ridge: float, damping: float) -> None:
    """P - s (P r)(P r)^T / (a + r P r^T) for each row r, in place.

    Args:
        projection: P, [d, d].
        rows: The directions to project off, [n, d].
        ridge: a.
        damping: s; with 1 the result is (I + R^T R / a)^-1.
    """
    for row in rows:
        image = projection @ row
        projection -= damping * torch.outer(image, image) / (ridge + row @ image)


def meet(weights: Sequence[Tensor], projections: Sequence[Tensor], method: MaEcho) -> Tensor:
    """The mean of all clients' W_i after they have moved, [out, d].

    Args:
        weights: W_i, [out, d] each.
        projections: P_i, [d, d] each.
        method: Its iterations, step and normalisation.
    """
    own, away = torch.stack(list(weights)), torch.stack(list(projections))
    used = away - torch.eye(away.shape[1], dtype=away.dtype)
    common = own.mean(0)
    for _ in range(method.iterations):
        common = common + method.step * ((common - own) @ used).mean(0)
        moves = (common - own) @ away
        if method.normalise:
            norms = moves.norm(dim=2, keepdim=True)
            moves = moves / norms.where(norms > 0.0, torch.ones_like(norms))
        own = own + method.step * moves
    return own.mean(0)


def layers_of(layout: ParameterLayout) -> list[tuple[Entry, Entry | None]]:
    """Weight and bias of every prunable layer."""
    biases = {entry.name.removesuffix("bias"): entry for entry in layout.other if entry.name.endswith("bias")}
    return [(entry, biases.get(entry.name.removesuffix("weight"))) for entry in layout.prunable]


def width(weight: Entry, bias: Entry | None) -> int:
    """Columns of a layer's matrix: its fan-in, and one for the bias."""
    return weight.size // weight.shape[0] + (bias is not None)


def _triangle(size: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(size, size)
    return rows, columns


def _unpacked(packed: Tensor, size: int) -> Tensor:
    """The symmetric matrix of an upper triangle, float64[size, size]."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[_triangle(size)] = packed.double()
    return matrix + matrix.triu(1).T


@dataclass(frozen=True, kw_only=True)
class MaEcho(Algorithm):
    """One-shot federated learning by matrices that say where each client's model may move."""

    name = "ma_echo"
    paper = "Su et al., Neural Networks 2023, arXiv 2204.12493"
    departures = (
        "Clients weigh the same; a quadratic program for their weights is commented out in the code.",
        "A bias is a column of its layer; the authors' networks have none, and no norms.",
    )
    client = MaEchoClient
    weighting = "equal"
    keeps_updates = True

    iterations: int = hyperparameter(
        60,
        "moves of all models",
        low=0,
        high=10000,
        source="the authors' README: 60 for the MLP, 300 for the CNN",
    )
    step: float = hyperparameter(
        1.6,
        "length of a move",
        low=0.0,
        high=2.0,
        search=(0.1, 1.9),
        source="README; 0.05 normalised",
    )
    normalise: bool = hyperparameter(False, "whether each row of a move has length 1 first; for the CNN")
    damping: float = hyperparameter(
        0.5,
        "share of a direction that one batch takes out of P",
        low=0.0,
        high=1.0,
        source="the authors' code",
    )
    ridge: float = hyperparameter(
        0.02512, "added to a direction's length, linear layers", above=0.0, low=0.0, high=1.0, log=True
    )
    ridge_conv: float = hyperparameter(
        1e-4, "the same of convolutions", above=0.0, low=0.0, high=1.0, log=True, source="the authors' code"
    )
    own_initialisation: bool = hyperparameter(True, "whether clients begin at random weights of their own")
    split_head: bool = hyperparameter(
        True, "whether a class's row of the last layer is the mean over the clients that have the class"
    )
    max_fan_in: int = hyperparameter(2048, "widest layer, whose P is as many squared", low=1, high=65536)

    def problems(self, config: Any) -> Iterator[str]:
        """One round of all, whose models are far from the global one."""
        if config.rounds != 1:
            yield f"rounds: {config.rounds}; ma_echo is done after one, set rounds=1"
        if config.cohort != config.population:
            yield f"cohort: {config.cohort}; ma_echo asks all clients at once, set cohort={config.population}"
        if config.weighting != "equal":
            yield f"aggregation.weighting: {config.weighting}; ma_echo's models weigh the same, leave it out"
        if config.adapter is not None and self.own_initialisation:
            yield (
                "adapter: it is made for its frozen base, and with ma_echo clients begin at weights of their "
                "own; set algorithm.own_initialisation=false"
            )
        if config.max_update_norm is not None and self.own_initialisation:
            yield (
                f"max_update_norm: {config.max_update_norm:g}; models of their own initialisation are far "
                "from the global one, leave it out or set algorithm.own_initialisation=false"
            )
        if config.objective.name != "classification":
            yield f"objective.name: {config.objective.name}; ma_echo's last layer has a row a class"

    def carries(self, layout: ParameterLayout) -> Mapping[str, Carried]:
        """Up, the upper triangle of each layer's P but the last one's, and a float a class.

        Raises:
            ValueError: A layer is too wide, or is none that has a P.
        """
        found = {}
        for weight, bias in layers_of(layout)[:-1]:
            size = width(weight, bias)
            if size > self.max_fan_in:
                raise ValueError(
                    f"algorithm.max_fan_in: {self.max_fan_in}, but {weight.name} has {size} inputs, whose "
                    f"matrix is {4e-6 * size * (size + 1) / 2:,.0f} MB of every upload"
                )
            if len(weight.shape) not in (2, 4):
                raise ValueError(
                    f"algorithm.name: ma_echo knows linear layers and 2d convolutions; not {weight.name}"
                )
            found[f"projection.{weight.name}"] = Carried(size * (size + 1) // 2, "up")
        return {**found, "classes": Carried(layout.head[0].shape[0], "up")}

    def aggregate(self, state: ServerState, total: Total, layout: ParameterLayout) -> Tensor:
        """The mean, but for the layers, of which it is that of the moved matrices."""
        mean = super().aggregate(state, total, layout)
        assert total.updates is not None
        sent = [torch.from_numpy(values.copy()) for values, _ in total.updates.values()]
        carried = [layout.split(values, layout.up) for values in sent]
        layers = layers_of(layout)
        for weight, bias in layers[:-1] if self.iterations else ():
            size = width(weight, bias)
            projections = [_unpacked(own[f"projection.{weight.name}"], size) for own in carried]
            _write(mean, weight, bias, meet([_matrix(v, weight, bias) for v in sent], projections, self))
        if self.split_head:
            held = torch.stack([own["classes"] for own in carried]).double()
            rows = torch.stack([_matrix(values, *layers[-1]) for values in sent])
            summed = (held[:, :, None] * rows).sum(0)
            _write(mean, *layers[-1], summed / held.sum(0).clamp(min=1.0)[:, None])
        return mean


def _matrix(flat: Tensor, weight: Entry, bias: Entry | None) -> Tensor:
    """A layer's weight and, as one more column, its bias, float64[out, d]."""
    matrix = flat[weight.span].double().view(weight.shape[0], -1)
    return matrix if bias is None else torch.cat([matrix, flat[bias.span].double()[:, None]], 1)


def _write(flat: Tensor, weight: Entry, bias: Entry | None, matrix: Tensor) -> None:
    columns = weight.size // weight.shape[0]
    flat[weight.span] = matrix[:, :columns].reshape(-1).float()
    if bias is not None:
        flat[bias.span] = matrix[:, columns].float()
