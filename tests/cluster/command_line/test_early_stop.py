"""Ctrl-C in the first second, while modules are still being loaded: one word, no traceback."""

import subprocess
import sys

import pytest

INTERRUPTED = """
import sys
wanted = sys.argv.pop(1)

class Press:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            raise KeyboardInterrupt
        return None

sys.meta_path.insert(0, Press())
from cluster.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "module", ["cluster.cli", "cluster.command_line.arguments", "rich.console", "cluster.execution", "torch"]
)
def test_a_ctrl_c_while_a_module_is_loaded(module, tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, module, "run", "--output", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.stderr.strip() == "stopped"
    assert ended.returncode == 130
    assert not (tmp_path / "run").exists()
