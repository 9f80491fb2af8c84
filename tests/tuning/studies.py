"""Studies small enough for a test."""

from rich.console import Console

from tests.tiny_experiment import tiny_federation
from tuning.folder import StudyFolder
from tuning.running import run_study
from tuning.study import plan_of


def tiny_tree(tmp_path, study, **overrides):
    """Nested values of a study on the tiny federation: 3 rounds of 4 clients, inline, a fifth held out."""
    changes = {"rounds": 3, "data": {"validation": 0.2}, "tracking": {"enabled": False}} | overrides
    tree = tiny_federation(tmp_path, **changes).dump()
    return {**tree, "study": study}


def tiny_plan(tmp_path, study, **overrides):
    """The plan of :func:`tiny_tree`."""
    return plan_of(tiny_tree(tmp_path, study, **overrides), "tiny")


def finish(plan, path):
    """Run a study to its end, unseen; returns what every method came to."""
    result = run_study(plan, StudyFolder(path), Console(quiet=True))
    assert not result.stopped
    return result.methods


def seen(results):
    """What each method was tried on and what came out: equal for equal studies."""
    return {
        label: [(trial.number, trial.state, trial.values, trial.value) for trial in result.tried]
        for label, result in results.items()
    }
