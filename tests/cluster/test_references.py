"""The one loader of a user's own code, and the nearest spelling."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster.references import UserError, did_you_mean, load_reference, nearest


class Wrong(UserError):
    pass


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory that is not on the path yet; modules imported from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_of_the_working_directory_is_found(here):
    (here / "mine_of_a_user.py").write_text("thing = 3\n")
    assert load_reference("data.name", "mine_of_a_user:thing", Wrong) == 3
    assert sys.path[-1] == str(here)  # last, so that it hides no library


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("mine_absent:thing", "there is no module 'mine_absent'"),
        ("mine_present:thin", "module 'mine_present' has no 'thin'; did you mean thing?"),
        ("mine_present:", "has no ''"),
        ("mine_present", "has no ''"),
        (":thing", "expected module:attribute"),
        ("..mine:thing", "expected module:attribute"),
    ],
)
def test_what_is_missing_is_named(here, reference, says):
    (here / "mine_present.py").write_text("thing = 3\n")
    with pytest.raises(Wrong) as caught:
        load_reference("model.name", reference, Wrong)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"model.name = {reference!r}: ")


@pytest.mark.parametrize("source", ["import no_such_module_at_all", "raise ValueError('mine')", "1 / 0"])
def test_a_failure_inside_the_module_keeps_its_own_traceback(here, source):
    (here / "mine_broken.py").write_text(source)
    with pytest.raises((ImportError, ValueError, ZeroDivisionError)) as caught:
        load_reference("algorithm.name", "mine_broken:A", Wrong)
    assert not isinstance(caught.value, UserError)


def test_a_clash_with_a_package_of_the_project_is_named(here):
    (here / "algorithms.py").write_text("Mine = 1\n")
    with pytest.raises(Wrong, match="algorithms is a package of sparsyfed itself: rename your own"):
        load_reference("algorithm.name", "algorithms:Mine", Wrong)


def test_nearest_spelling():
    assert nearest("sparsifed", ["topk", "sparsyfed"]) == "sparsyfed"
    assert nearest("xyz", ["topk"]) is None
    assert did_you_mean("tpok", ["topk"]) == "; did you mean topk?"
    assert did_you_mean(7, ["topk"]) == ""
