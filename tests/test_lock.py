"""uv.lock: exact versions from public places, which satisfy what pyproject.toml asks for."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "uv.lock").read_text(encoding="utf-8")
LOCKED = tomllib.loads(TEXT)["package"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ASKED = [Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines]


def test_the_lock_names_public_hosts_alone():
    """Not an index or a mirror of the machine that made it."""
    assert set(re.findall(r"\w+://[^/\"]+", TEXT)) == {"https://pypi.org", "https://files.pythonhosted.org"}
    sources = {tuple(package["source"].items()) for package in LOCKED if package["name"] != "sparsyfed"}
    assert sources == {(("registry", "https://pypi.org/simple"),)}


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_the_locked_version_is_one_that_is_asked_for(asked):
    versions = [each["version"] for each in LOCKED if each["name"] == canonicalize_name(asked.name)]
    assert versions
    assert all(asked.specifier.contains(version) for version in versions)


def test_the_lock_is_of_these_dependencies():
    """``uv lock --check`` says more, but needs uv."""
    (own,) = (package for package in LOCKED if package["name"] == "sparsyfed")
    told = own["metadata"]
    assert told["provides-extras"] == list(EXTRAS)
    names = {(canonicalize_name(each["name"]), each.get("specifier", "")) for each in told["requires-dist"]}
    specifiers = {(name, frozenset(filter(None, text.split(",")))) for name, text in names}
    assert specifiers == {
        (canonicalize_name(each.name), frozenset(filter(None, str(each.specifier).split(","))))
        for each in ASKED
    }


@pytest.mark.parametrize("python", ["3.11.2", "3.11.9", "3.12.3", "3.13.0"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_constraints_for_pip_give_each_package_one_version(python, system):
    """What .ci/run installs with."""
    lines = [Requirement(line) for line in runpy.run_path(str(ROOT / ".ci/constraints.py"))["lines"]()]
    here = {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "sys_platform": system,
    }
    held = [each for each in lines if each.marker is None or Marker(str(each.marker)).evaluate(here)]
    assert sorted(each.name for each in held) == sorted({p["name"] for p in LOCKED} - {"sparsyfed"})
    for each in held:
        (version,) = each.specifier
        assert (each.name, version.version) in {(p["name"], p["version"]) for p in LOCKED}
