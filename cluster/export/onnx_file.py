"""An ONNX file of a run's model, checked against torch's outputs where onnxruntime is installed."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cluster.export.finished import ExportError, Finished
from cluster.records.model_card import card
from cluster.records.model_file import model_metadata
from cluster.records.run_folder import check_free
from cluster.references import installed
from cluster.workload.inputs import to_input

#: Share of the largest output by which the two may differ: other kernels, other orders of addition.
_TOLERANCE = 1e-4
_CHECKED = 64

_USE = """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(outputs,) = session.run(None, {{"inputs": inputs}})  # {dtype} {shape}, any n
```
"""


def write(finished: Finished, output: Path) -> str:
    """Write ``model.onnx`` and its card; says in one line how it compares with torch.

    Args:
        finished: The run.
        output: A new or empty folder.

    Raises:
        ExportError: A package is missing, torch cannot export the model, or the file computes something else.
    """
    if missing := [name for name in ("onnx", "onnxscript") if not installed(name)]:
        raise ExportError(
            f"--to onnx needs {' and '.join(missing)}, not installed here: pip install 'sparsyfed[onnx]'"
        )
    check_free(output)
    config, dataset = finished.config, finished.dataset
    example = to_input(dataset.train.inputs[:2], torch.device("cpu"))
    use = _USE.format(shape=finished.batch, dtype=str(example.dtype).removeprefix("torch."))
    text = card(config, dataset, finished.result.summary, finished.line, use, library="onnx")
    inputs = to_input(dataset.train.inputs[:_CHECKED], torch.device("cpu"))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as place:
        file = Path(place) / "model.onnx"
        _export(finished.model, example, model_metadata(config, finished.line), file, config.model.name)
        compared = _compare(finished.model, inputs, file)
        (file.parent / "README.md").write_text(text, encoding="utf-8")
        output.mkdir(exist_ok=True)
        for path in file.parent.iterdir():  # large weights lie in a file beside the model's
            shutil.move(path, output / path.name)
    return compared


def _export(model: nn.Module, example: Tensor, said: dict[str, str], file: Path, name: str) -> None:
    """Have torch trace the model with a batch of any size, and write it with what it says of itself."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision's absence
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                input_names=["inputs"],
                output_names=["outputs"],
                dynamic_shapes=({0: torch.export.Dim("n")},),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # whatever a model of one's own does
        reason = str(error).strip().split("\n")[0]
        raise ExportError(f"model.name = {name}: torch.onnx cannot export it: {reason}") from error
    assert program is not None
    program.model.metadata_props.update(said)
    program.save(str(file))


def _compare(model: nn.Module, inputs: Tensor, file: Path) -> str:
    """Compare the file's outputs with torch's.

    Raises:
        ExportError: They differ by more than rounding.
    """
    if not installed("onnxruntime"):
        return "not compared with torch: onnxruntime is not installed here"
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"inputs": inputs.numpy()})
    with torch.no_grad():
        expected = model(inputs).numpy()
    apart = float(np.abs(found - expected).max())
    if not apart <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ExportError(
            f"{file.name} computes something else: its outputs are up to {apart:.3g} off torch's"
        )
    return f"onnxruntime gives torch's outputs on {len(inputs)} samples, at most {apart:.2g} apart"
