"""Comparing runs: from run folders or an MLflow experiment to a table, plots and one report.

``reading`` brings runs from either source to one form, ``groups`` puts those that differ only in their seed
together and names them, ``table`` holds the figures and tests, ``plots`` the pictures (``curves`` over
rounds, ``endings``); ``formats``, ``html`` and ``report`` write them down.
"""

from cluster.compare.costs import budgets_of
from cluster.compare.formats import print_comparison
from cluster.compare.groups import group_runs
from cluster.compare.reading import ComparisonError, Run, read_experiment, read_folders
from cluster.compare.report import log_to_mlflow, write
from cluster.compare.table import Comparison, Table, target_of
from cluster.compare.watching import watch

__all__ = [
    "Comparison",
    "ComparisonError",
    "Run",
    "Table",
    "budgets_of",
    "group_runs",
    "log_to_mlflow",
    "print_comparison",
    "read_experiment",
    "read_folders",
    "target_of",
    "watch",
    "write",
]
