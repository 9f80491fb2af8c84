"""Runs a module as ``python -m`` does where only the packages of the slim inline path can be imported.

    python -m tests.slim cluster run quickstart execution=inline ...

Importing it is enough to hide the others, so that processes spawned by such a one do not see them either.
"""

import importlib.abc
import runpy
import sys

#: Dependencies that ``execution=inline`` does without.
HIDDEN = ("ray", "mlflow", "optuna", "datasets", "matplotlib", "pandas", "scipy", "sklearn", "pytest")


class _Others(importlib.abc.MetaPathFinder):
    """The finders that were there; they find no spec of what is hidden, as where it is not installed."""

    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

    def invalidate_caches(self):
        for finder in self.finders:
            getattr(finder, "invalidate_caches", lambda: None)()


sys.meta_path[:] = [_Others(list(sys.meta_path))]

if __name__ == "__main__":
    _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")
