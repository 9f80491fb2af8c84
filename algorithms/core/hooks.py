"""Whether a method's overrides can be called as the hooks that they replace."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from algorithms.core.algorithm import Algorithm
from algorithms.core.client import Client


def mistaken_hooks(method: type[Algorithm]) -> Iterator[str]:
    """A line for each override, in either half of a method, that takes other arguments than its hook."""
    for own, base in ((method, Algorithm), (method.client, Client)):
        for name, hook in vars(base).items():
            override = getattr(own, name)
            if name.startswith("_") or not inspect.isfunction(hook) or not inspect.isfunction(override):
                continue
            given, called = inspect.signature(override), inspect.signature(hook)
            try:
                given.bind(*called.parameters)
            except TypeError:
                yield (
                    f"{own.__name__}.{name}({', '.join(given.parameters)}) is called as "
                    f"{name}({', '.join(called.parameters)})"
                )
