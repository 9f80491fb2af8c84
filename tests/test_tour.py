"""The tour, a notebook: its cells run one after another, and it is kept with what they printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

TOUR = Path(__file__).parents[1] / "docs" / "tour.ipynb"
CODE = [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def statements(cell):
    """A cell as Python; the one magic writes a file."""
    source = "".join(cell["source"])
    head, _, text = source.partition("\n")
    if head.startswith("%%writefile "):
        return f"Path({head.split()[1]!r}).write_text({text!r})"
    assert not source.startswith(("%", "!"))
    return source


def test_the_cells_run(tmp_path):
    """In one namespace, as a script in an empty folder; of fewer rounds than are shown."""
    script = "\n".join(map(statements, CODE))
    assert (script.count('"rounds=12"'), script.count('"rounds=6"')) == (1, 1)
    script = script.replace('"rounds=12"', '"rounds=2"').replace('"rounds=6"', '"rounds=1"')
    (tmp_path / "tour.py").write_text(script, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(TOUR.parents[1]), "MPLBACKEND": "agg"}
    environment["TMPDIR"] = str(tmp_path)  # where the tour makes its folder
    command = [sys.executable, "tour.py"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "| topk |" in ended.stdout
    (runs,) = tmp_path.glob("*/runs")
    assert {"first", "two", "own", "study"} <= {path.name for path in runs.iterdir()}


def test_what_the_cells_printed_is_kept():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert all(output.get("name") != "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert TOUR.stat().st_size < 200_000
