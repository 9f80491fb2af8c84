"""Every second speaker's rows go to each half, of every split."""

import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.split_speakers import split


def test_halves(tmp_path):
    folder = tmp_path / "speeches"
    folder.mkdir()
    rows = {"train": ["D", "A", "B", "A", "C"], "test": ["B", "C"]}
    for name, speakers in rows.items():
        texts = [f"{speaker} {place}" for place, speaker in enumerate(speakers)]
        pq.write_table(pa.table({"speaker": speakers, "text": texts}), folder / f"{name}-0.parquet")
    assert split(folder, tmp_path / "halves") == {"base": 2, "rest": 2}  # A and C, B and D
    found = {
        (half, name): pq.read_table(tmp_path / "halves" / half / f"{name}-0.parquet")["text"].to_pylist()
        for half in ("base", "rest")
        for name in rows
    }
    assert found == {
        ("base", "train"): ["A 1", "A 3", "C 4"],
        ("base", "test"): ["C 1"],
        ("rest", "train"): ["D 0", "B 2"],
        ("rest", "test"): ["B 0"],
    }
