"""Fair comparison: every method tuned under one protocol, then judged on fresh seeds. Imports cluster.

From Python: ``tuning.run("study-digits").ranking``; ``tuning.objective(config)`` for an Optuna loop of your
own.

``study`` reads the study file, ``spaces`` what is tuned, ``coordinator`` runs trials on the cluster through
one ``search`` a method, ``protocol`` and ``report`` say what it all came to, ``dashboard`` what Optuna's
shows of it.
"""

from importlib import import_module
from typing import Any

#: Where the public names live. Lazy, as in ``cluster``.
_PUBLIC = {
    "StudyResult": "tuning.running",
    "objective": "tuning.own_loop",
    "run": "tuning.running",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tuning' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
