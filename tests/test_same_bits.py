"""The final models of short runs are those that were recorded on this kind of machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.same_bits import CASES, final_model, machine

RECORDED = json.loads((Path(__file__).parent / "hashes.json").read_text(encoding="utf-8"))


# On Ray the same bits are asserted against inline runs, in tests/cluster/actors.
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "execution=ray" not in case])
def test_the_bits_of_a_final_model(name, tmp_path):
    known = RECORDED.get(machine())
    if known is None:
        pytest.skip(f"no hashes were recorded on {machine()}; python -m tests.same_bits --record")
    assert final_model(CASES[name], tmp_path / "run") == known[name]
