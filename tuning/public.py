"""The public names in one place: ``import sparsyfed``, as which this file is installed.

An experiment: ``resolve``, ``run``, ``resume``, and the ``Result`` of one. Many: ``expand`` and ``run_grid``,
the room ``compare``, and for studies ``load_plan``, ``run_study``, ``final_table``, or ``objective`` for
a loop of Optuna's. A method of one's own: ``Algorithm``, ``Client``, ``hyperparameter`` and all else that the
package ``algorithms`` has for one.

Each is the object of the file that it lives in. What runs experiments is loaded when it is asked for, so that
a file with a method brings torch and numpy alone into an actor.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import algorithms
from algorithms import *  # noqa: F403
from cluster import __version__ as __version__

if TYPE_CHECKING:
    from cluster import compare
    from cluster.configuration.config import Config, resolve
    from cluster.configuration.trees import ConfigError
    from cluster.execution import Result, resume, run
    from cluster.export.hub import load_model
    from cluster.grid import expand, run_grid
    from cluster.references import UserError
    from cluster.rounds.setbacks import DivergedError
    from tuning.folder import StudyFolder
    from tuning.own_loop import objective
    from tuning.protocol import MethodResult
    from tuning.report import final_table
    from tuning.running import StudyResult, run_study
    from tuning.study import Plan, load_plan

#: Where the names above live.
_HOMES = {
    "Config": "cluster.configuration.config",
    "ConfigError": "cluster.configuration.trees",
    "DivergedError": "cluster.rounds.setbacks",
    "MethodResult": "tuning.protocol",
    "Plan": "tuning.study",
    "Result": "cluster.execution",
    "StudyFolder": "tuning.folder",
    "StudyResult": "tuning.running",
    "UserError": "cluster.references",
    "expand": "cluster.grid",
    "final_table": "tuning.report",
    "load_model": "cluster.export.hub",
    "load_plan": "tuning.study",
    "objective": "tuning.own_loop",
    "resolve": "cluster.configuration.config",
    "resume": "cluster.execution",
    "run": "cluster.execution",
    "run_grid": "cluster.grid",
    "run_study": "tuning.running",
}

__all__ = [
    "Config",
    "ConfigError",
    "DivergedError",
    "MethodResult",
    "Plan",
    "Result",
    "StudyFolder",
    "StudyResult",
    "UserError",
    "compare",
    "expand",
    "final_table",
    "load_model",
    "load_plan",
    "objective",
    "resolve",
    "resume",
    "run",
    "run_grid",
    "run_study",
]
__all__ += algorithms.__all__


def __getattr__(name: str) -> Any:
    if name == "compare":  # a room, not one of its names
        return import_module("cluster.compare")
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsyfed' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
