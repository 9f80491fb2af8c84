"""Runs a module as ``python -m`` does where only the packages of the slim inline path can be imported.

    python -m tests.slim cluster run quickstart execution=inline ...

Importing it is enough to hide the others, so that processes spawned by such a one do not see them either.
"""

import importlib.abc
import runpy
import sys

#: Dependencies that ``execution=inline`` does without.
HIDDEN = ("ray", "mlflow", "optuna", "datasets", "matplotlib", "pandas", "scipy", "sklearn", "pytest")


class _Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _Hidden())

if __name__ == "__main__":
    _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")
