"""``sparsyfed export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from cluster.command_line.figures import shown
from cluster.export import flower, hub, onnx_file
from cluster.export.finished import Finished

_WRITERS = {"hub": hub.write, "onnx": onnx_file.write, "flower": flower.write}


def export(console: Console, arguments: argparse.Namespace) -> int:
    """Make what is asked for of a run and say where it is."""
    folder, to = Path(arguments.folder), arguments.to
    output = Path(arguments.output) if arguments.output else folder / to
    said = _WRITERS[to](Finished.open(folder, trust=arguments.trust), output)
    console.print(f"folder    {shown(output)}\n{said}", soft_wrap=True, markup=False, highlight=False)
    return 0
