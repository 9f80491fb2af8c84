"""What a method does: one file a method, both halves visible. Knows torch and numpy only.

``registry()`` lists the methods. Adding one is adding one file here (or a ``module:attribute`` of your own).
"""

from importlib import import_module
from pkgutil import iter_modules

from algorithms.aggregation import Grid, Total
from algorithms.algorithm import (
    Algorithm,
    Client,
    Instructions,
    ServerState,
    Visit,
    registry,
)
from algorithms.hyperparameters import Hyperparameter, hyperparameter, hyperparameters
from algorithms.parameters import Entry, ParameterLayout
from algorithms.server_optimizers import SERVER_OPTIMIZERS, ServerOptimizer

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "SERVER_OPTIMIZERS",
    "Algorithm",
    "Client",
    "Entry",
    "Grid",
    "Hyperparameter",
    "Instructions",
    "ParameterLayout",
    "ServerOptimizer",
    "ServerState",
    "Total",
    "Visit",
    "hyperparameter",
    "hyperparameters",
    "registry",
]
