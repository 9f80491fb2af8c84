"""Where and when it happens. Imports algorithms.

From Python: ``cluster.run(cluster.resolve("quickstart", ["algorithm.beta=1.3"]))``.

The rooms, from the ground up; each imports only what stands below it (``tests/test_floors.py``):

- ``references``, ``disk``, ``logins``, ``seeding``, ``statistics``, ``flops``: the ground
- ``configuration``: every key, presets, overrides
- ``workload``: data sets, partitions, models
- ``transport``: the wire, what goes down and what comes up
- ``simulation``: devices, the simulated clock, who is asked, shifts of the data
- ``exchange``, ``federation``: what driver and actors say to each other, and what they play with
- ``clients``: local training and what surrounds it
- ``records``: run folder, checkpoints, MLflow
- ``rounds``: the driver, its schedules, what it measures
- ``actors``: Ray
- ``execution``, ``grid``: a run, many runs
- ``export``: a finished run for a model hub, ONNX runtimes, Flower
- ``compare``: runs side by side
- ``command_line``, ``cli``: arguments, help, live progress, ``describe``
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

#: Where the public names live. Lazy: importing one of the rooms must not load torch and Ray for all of them.
_PUBLIC = {
    "Config": "cluster.configuration.config",
    "ConfigError": "cluster.configuration.trees",
    "DivergedError": "cluster.rounds.setbacks",
    "Result": "cluster.execution",
    "load_model": "cluster.export.hub",
    "resolve": "cluster.configuration.config",
    "resume": "cluster.execution",
    "run": "cluster.execution",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cluster' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
