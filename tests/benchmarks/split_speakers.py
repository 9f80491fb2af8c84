"""Two halves of a table of speeches: one to train a base on, one whose speakers adapt it.

    python -m tests.benchmarks.split_speakers FOLDER HALVES

FOLDER holds parquet files with a column ``speaker``, as ``data.path`` takes them. Of the speakers of all
files in alphabetical order the first, third ... go to HALVES/base, the others to HALVES/rest, each with their
rows of every split.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


def split(folder: Path, halves: Path) -> dict[str, int]:
    """Write the halves; returns how many speakers each has."""
    tables = {path: pq.read_table(path) for path in sorted(folder.glob("**/*.parquet"))}
    if not tables:
        raise SystemExit(f"{folder}: there are no parquet files")
    speakers = sorted({name for table in tables.values() for name in table["speaker"].to_pylist()})
    found = {}
    for half, own in (("base", speakers[::2]), ("rest", speakers[1::2])):
        for path, table in tables.items():
            place = halves / half / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.filter(pc.is_in(table["speaker"], pa.array(own))), place)
        found[half] = len(own)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("halves", type=Path)
    options = parser.parse_args(argv)
    for half, speakers in split(options.folder, options.halves).items():
        print(f"{options.halves / half}: {speakers} speakers")


if __name__ == "__main__":
    main()
