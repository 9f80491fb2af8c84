"""What a run leaves behind, whatever fails while it is written."""

import logging

import cluster
from cluster.records import outputs
from tests.tiny_experiment import tiny_federation


def test_a_picture_that_fails_is_one_line_and_ends_no_run(cache, tmp_path, monkeypatch, caplog):
    def fails(lines, path, selects, *, title):
        path.write_bytes(b"half a picture")
        raise ValueError("Unknown symbol:\n    ^")

    monkeypatch.setattr(outputs, "curves", fails)
    with caplog.at_level(logging.WARNING, logger="sparsyfed.outputs"):
        result = cluster.run(tiny_federation(cache, rounds=1), tmp_path / "run")
    assert result.ended
    left = {path.name for path in result.folder.glob("*.png")}
    assert left == {"partition.png", "devices.png"}
    (said,) = [record.getMessage() for record in caplog.records if record.name == "sparsyfed.outputs"]
    assert said == f"{result.folder / 'curves.png'} is not drawn: ValueError: Unknown symbol: ^"
