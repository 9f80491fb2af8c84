"""Where and when it happens: driver, actors, devices, wire, data, tracking, command line.

Imports algorithms. From Python: ``cluster.run(cluster.resolve("quickstart", ["algorithm.beta=1.3"]))``.
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
