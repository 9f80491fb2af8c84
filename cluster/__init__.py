"""Where and when it happens. Imports algorithms.

From Python: ``cluster.run(cluster.resolve("quickstart", ["algorithm.beta=1.3"]))``.

The way of a run is in the files here: ``cli`` -> ``execution`` -> ``driver`` -> ``engine``. What they use:

- ``configuration``: every key, presets, overrides
- ``command_line``: arguments, help, live progress, ``describe``
- ``workload``: data sets, partitions, models
- ``simulation``: devices, the simulated clock, who is asked and whose updates count
- ``clients``: local training and what surrounds it
- ``transport``: the wire
- ``actors``: Ray
- ``records``: run folder, checkpoints, MLflow
- ``compare``: runs side by side
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy: importing one of the room's modules must not load torch and Ray for all of them.
    if name in ("run", "resume", "Result"):
        from cluster import execution

        return getattr(execution, name)
    if name == "ConfigError":
        from cluster.configuration import trees

        return trees.ConfigError
    if name in ("Config", "resolve"):
        from cluster.configuration import config

        return getattr(config, name)
    raise AttributeError(f"module 'cluster' has no attribute {name!r}")
