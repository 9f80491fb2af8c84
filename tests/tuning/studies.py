"""Studies small enough for a test."""

from tests.naive import tiny_federation
from tuning.study import plan_of


def tiny_tree(tmp_path, study, **overrides):
    """Nested values of a study on the tiny federation: 3 rounds of 4 clients, inline, a fifth held out."""
    changes = {"rounds": 3, "data": {"validation": 0.2}, "tracking": {"enabled": False}} | overrides
    tree = tiny_federation(tmp_path, **changes).dump()
    return {**tree, "study": study}


def tiny_plan(tmp_path, study, **overrides):
    """The plan of :func:`tiny_tree`."""
    return plan_of(tiny_tree(tmp_path, study, **overrides), "tiny")
