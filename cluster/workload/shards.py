"""Which parquet files of a folder are a split: all of them, and each once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cluster.references import DataError

#: The hub's names: train-00000-of-00003.parquet; older ones end with a hash of the content.
_NUMBERED = re.compile(r"(?P<of>.+)-(?P<index>\d{1,6})-of-(?P<count>\d{1,6})(-[0-9a-f]+)?\.parquet")
#: Those of its automatic conversion: train/0000.parquet.
_COUNTED = re.compile(r"\d{1,6}\.parquet")


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The parquet files of a split, in the order of their names.

    They are ``<split>.parquet``, ``<split>-*.parquet`` or ``<split>/*.parquet`` in ``folder``, or in its
    subfolder ``data``.

    Raises:
        DataError: There are none, one of a numbered set is missing, or several sets lie side by side.
    """
    if not folder.is_dir():
        raise DataError(
            f"data.path = '{folder}' is no folder on this node; absolute path: {folder.absolute()}"
        )
    for place in (folder, folder / "data"):
        patterns = (f"{split}.parquet", f"{split}-*.parquet", f"{split}/*.parquet")
        sets = [files for pattern in patterns if (files := sorted(place.glob(pattern)))]
        if len(sets) > 1:
            raise _two_sets(folder, split, [files[0].relative_to(folder) for files in sets])
        if sets:
            _check_complete(folder, split, sets[0])
            return sets[0]
    found = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.parquet"))
    raise DataError(
        f"data.path = '{folder}' has no '{split}-*.parquet', '{split}.parquet' or '{split}/*.parquet', nor "
        f"has its subfolder data; parquet files found: {found[:10] or 'none'} (data.train_split and "
        f"data.test_split name the splits)"
    )


def _check_complete(folder: Path, split: str, files: list[Path]) -> None:
    """Refuse numbered files of which one is missing, or which do not belong together."""
    numbered = [(file, match) for file in files if (match := _NUMBERED.fullmatch(file.name))]
    sets = {(match["of"], int(match["count"])): file for file, match in reversed(numbered)}
    others = [file for file in files if not _NUMBERED.fullmatch(file.name)]
    if sets and (len(sets) > 1 or others):
        examples = [*sets.values(), *others[:1]]
        raise _two_sets(folder, split, sorted(file.relative_to(folder) for file in examples))
    indices = [int(match["index"]) for _, match in numbered]
    wanted: Sequence[int] = range(next(iter(sets))[1]) if sets else indices
    if not sets and all(_COUNTED.fullmatch(file.name) for file in files):
        indices = sorted(int(file.stem) for file in files)
        # Other numbers are dates or the like; whether the last one is there cannot be known.
        wanted = range(indices[0], indices[-1] + 1) if indices[0] in (0, 1) else indices
    missing = sorted(set(wanted) - set(indices))
    if missing or len(indices) != len(wanted):
        width = len(numbered[0][1]["index"]) if numbered else len(files[0].stem)
        lacks = ", ".join(f"{index:0{width}}" for index in missing[:5]) + ", ..." * (len(missing) > 5)
        raise DataError(
            f"data.path = '{folder}': the files of split {split!r} are not complete: "
            + (f"number {lacks} of {len(wanted)} is missing" if missing else "a number occurs twice")
            + f" (found {', '.join(file.name for file in files[:5])}{', ...' * (len(files) > 5)})"
        )


def _two_sets(folder: Path, split: str, examples: list[Path]) -> DataError:
    return DataError(
        f"data.path = '{folder}': split {split!r} is there more than once, as "
        f"{' and as '.join(map(str, examples))}: move away what does not belong to it, or name the split in "
        f"data.train_split or data.test_split"
    )
