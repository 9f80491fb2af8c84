"""What a method does: one file a method, both halves visible. Knows torch and numpy only.

The methods are the files here, the machinery they share is in ``core``; start with ``fedavg``. ``registry()``
lists them. Adding one is adding one file here, or a ``module:attribute`` of your own, for which everything
that a method needs is importable from this package.
"""

from importlib import import_module
from pkgutil import iter_modules

from algorithms.core.aggregation import Grid, Total
from algorithms.core.algorithm import Algorithm, ServerState, registry
from algorithms.core.attacks import Attack, Pixels
from algorithms.core.client import Client, Instructions, Visit
from algorithms.core.hyperparameters import Hyperparameter, hyperparameter, hyperparameters
from algorithms.core.layers import ActivationPruning, Powerpropagation, prune_inputs, pruned_layers
from algorithms.core.local_optimizers import LOCAL_OPTIMIZERS, LocalOptimizer
from algorithms.core.masks import (
    cut_globally,
    cut_to_top_k,
    layer_counts,
    layer_wise_top_k,
    nonzero_mask,
    random_mask,
    target_count,
    top_k_mask,
)
from algorithms.core.parameters import Carried, Entry, ParameterLayout
from algorithms.core.robust import AGGREGATIONS, Aggregation
from algorithms.core.server_optimizers import SERVER_OPTIMIZERS, ServerOptimizer
from algorithms.core.sparsity_schedules import SparsitySchedule

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "AGGREGATIONS",
    "LOCAL_OPTIMIZERS",
    "SERVER_OPTIMIZERS",
    "ActivationPruning",
    "Aggregation",
    "Algorithm",
    "Attack",
    "Carried",
    "Client",
    "Entry",
    "Grid",
    "Hyperparameter",
    "Instructions",
    "LocalOptimizer",
    "ParameterLayout",
    "Pixels",
    "Powerpropagation",
    "ServerOptimizer",
    "ServerState",
    "SparsitySchedule",
    "Total",
    "Visit",
    "cut_globally",
    "cut_to_top_k",
    "hyperparameter",
    "hyperparameters",
    "layer_counts",
    "layer_wise_top_k",
    "nonzero_mask",
    "prune_inputs",
    "pruned_layers",
    "random_mask",
    "registry",
    "target_count",
    "top_k_mask",
]
