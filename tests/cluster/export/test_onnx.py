"""An ONNX file computes what torch does."""

import json

import numpy as np
import pytest
import torch

from cluster.export import onnx_file
from cluster.export.finished import ExportError

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_missing_package_is_named(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "installed", lambda package: package != "onnxscript")
    with pytest.raises(ExportError, match=r"--to onnx needs onnxscript, .* pip install 'sparsyfed\[onnx\]'"):
        onnx_file.write(finished, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_file_that_computes_something_else_is_not_left(finished, tmp_path, monkeypatch):
    def export(model, example, said, file, name):
        file.write_bytes(b"other")

    def compare(model, inputs, file):
        assert file.read_bytes() == b"other"
        raise ExportError("model.onnx computes something else")

    monkeypatch.setattr(onnx_file, "installed", lambda package: True)
    monkeypatch.setattr(onnx_file, "_export", export)
    monkeypatch.setattr(onnx_file, "_compare", compare)
    with pytest.raises(ExportError, match="computes something else"):
        onnx_file.write(finished, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_onnxruntime_gives_torchs_outputs(finished, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra onnx)")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra onnx)")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
    said = onnx_file.write(finished, tmp_path / "model")
    assert said.startswith("onnxruntime gives torch's outputs on 64 samples, at most ")
    file = tmp_path / "model" / "model.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        inputs = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
        (found,) = session.run(None, {"inputs": inputs.numpy()})
        np.testing.assert_allclose(found, finished.model(inputs).detach().numpy(), rtol=1e-4, atol=1e-5)
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert metadata["method"] == "topk"
    assert json.loads(metadata["metrics"])["test/accuracy"] == finished.line["test/accuracy"]
    text = (tmp_path / "model" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: onnx\n")
    assert str(tmp_path) not in text
    # The comparison can fail: the same file beside a model of other weights.
    with torch.no_grad():
        next(finished.model.parameters()).mul_(-1)
    with pytest.raises(ExportError, match=r"model.onnx computes something else: its outputs are up to"):
        onnx_file._compare(finished.model, torch.randn(4, 1, 8, 8), file)
