"""Text as samples of a fixed number of tokens.

To be foretold: each row of a table is a document of its own, never joined with another one, so that samples
can be given to the clients of their rows' groups. Its tokens t1 ... tm follow a boundary token B and are cut
into pieces, in which every token is a target exactly once; what is missing in the last piece is B in the
inputs and ``PADDING`` in the targets::

    inputs    B  t1 t2 | t3 t4 B         int16 or int32 [N, length]
    targets   t1 t2 t3 | t4 t5 -100      int64 [N, length]

A row without any text has nothing to foretell and is left out.

With a target of its own, each row is one sample: its first tokens, then B, which no text holds::

    inputs    t1 t2 B | t1 t2 t3           of rows t1 t2 and t1 t2 t3 t4
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.references import DataError
from cluster.workload import cache
from cluster.workload.labels import group_codes
from cluster.workload.tables import Table, choose_column, text_candidates
from cluster.workload.tokens import Tokenizer, tokenizer_named

#: Target of a place that holds no token.
PADDING = -100
USUAL_TEXT_COLUMNS = ("text", "content", "sentence", "snippets")
DEFAULT_TOKENIZER, DEFAULT_LENGTH = "bytes", 64


@dataclass(frozen=True)
class TextForm:
    """What text becomes.

    Attributes:
        column: Its column in a table; None to infer.
        tokenizer: What its tokens are, see :mod:`cluster.workload.tokens`.
        length: Tokens of a sample.
    """

    column: str | None = None
    tokenizer: str = DEFAULT_TOKENIZER
    length: int = DEFAULT_LENGTH


@dataclass(frozen=True)
class Documents:
    """The texts of one split, read anew as often as they are asked for.

    Attributes:
        place: Where they are from, for messages.
        read: The cells in order.
    """

    place: str
    read: Callable[[], Iterable[Any]]

    def texts(self) -> Iterator[str]:
        """The texts, once it is sure that they are some."""
        for row, cell in enumerate(self.read()):
            if not isinstance(cell, str):
                raise DataError(f"{self.place}: row {row} holds {_shown(cell)}; allowed are texts")
            yield cell


def write_text(
    folder: Path, form: TextForm, splits: Mapping[str, Documents], groups: list[Any] | None
) -> dict[str, Any]:
    """Write the samples of a text; returns what belongs beside them in meta.json.

    Args:
        folder: Where to write.
        form: Tokenizer and length.
        splits: Documents of ``train`` and ``test``.
        groups: Group of each document of ``train``, or None.

    Raises:
        DataError: A cell is no text, a split has none, or a document has no group.
    """
    tokenizer = tokenizer_named(form.tokenizer, splits["train"].texts())
    pieces: dict[str, np.ndarray] = {}
    for split, documents in splits.items():
        sizes = [len(tokenizer.encode(text)) for text in documents.texts()]
        pieces[split] = -(-np.array(sizes, np.int64) // form.length)
        if not pieces[split].sum():
            raise DataError(f"{documents.place} holds no text: {_rows(len(sizes))}")
        _write_samples(folder, split, documents.texts(), tokenizer, form.length, int(pieces[split].sum()))
    group_names: list[str] | None = None
    if groups is not None:
        codes, group_names = group_codes(groups, splits["train"].place)
        cache.save(folder / "train-groups.npy", np.repeat(codes, pieces["train"]))
    return {"classes": [], "vocabulary": tokenizer.vocabulary, "group_names": group_names}


def _write_samples(
    folder: Path, split: str, texts: Iterable[str], tokenizer: Tokenizer, length: int, samples: int
) -> None:
    boundary, inputs = _inputs(folder, split, tokenizer, (samples, length))
    targets = cache.new_array(folder / f"{split}-labels.npy", np.int64, (samples, length))
    targets[...] = PADDING
    row = 0
    for text in texts:
        codes = tokenizer.encode(text)
        for start in range(0, len(codes), length):
            piece = codes[start : start + length]
            targets[row, : len(piece)] = piece
            first = boundary if start == 0 else codes[start - 1]
            inputs[row, : len(piece)] = [first, *piece[:-1]]
            row += 1
    inputs.flush()
    targets.flush()


def _inputs(folder: Path, split: str, tokenizer: Tokenizer, shape: tuple[int, int]) -> tuple[int, np.memmap]:
    """The code of the boundary, and a new array of it that is to be filled with samples."""
    boundary = len(tokenizer.vocabulary) - 1
    kind = np.int16 if boundary < 2**15 else np.int32
    inputs = cache.new_array(folder / f"{split}-images.npy", kind, shape)
    inputs[...] = boundary
    return boundary, inputs


def write_sequences(
    folder: Path, form: TextForm, others: Sequence[str | None], tables: Mapping[str, Table]
) -> dict[str, Any]:
    """Write the texts of tables, one sample a row; returns what belongs beside them in meta.json.

    Args:
        folder: Where to write.
        form: Column, tokenizer and length.
        others: Columns that are no texts to read.
        tables: Splits, ``train`` first.

    Raises:
        DataError: There is no such column, or a cell is no text or an empty one.
    """
    train = tables["train"]
    candidates = [name for name in text_candidates(train) if name not in others]
    column = choose_column(train, "text_column", form.column, candidates, USUAL_TEXT_COLUMNS)
    if column in others:
        raise DataError(f"data.text_column = {column!r} is the column of the labels or groups too")
    choose_column(tables["test"], "text_column", column, [], ())
    splits = {split: _column(column, table) for split, table in tables.items()}
    tokenizer = tokenizer_named(form.tokenizer, splits["train"].texts())
    for split, documents in splits.items():
        _, inputs = _inputs(folder, split, tokenizer, (tables[split].rows, form.length))
        for row, text in enumerate(documents.texts()):
            codes = tokenizer.encode(text)[: form.length]
            if not len(codes):
                raise DataError(
                    f"{documents.place}: row {row} is empty; every text needs a token to be classified by"
                )
            inputs[row, : len(codes)] = codes
        inputs.flush()
    return {"vocabulary": tokenizer.vocabulary}


def write_tables(
    folder: Path, form: TextForm, group_column: str | None, train: Table, test: Table
) -> dict[str, Any]:
    """The same of a column of tables; see :func:`write_text`."""
    groups = None
    if group_column is not None:
        group_column = choose_column(train, "group_column", group_column, [], ())
        groups = list(train.column(group_column))
    candidates = [name for name in text_candidates(train) if name != group_column]
    column = choose_column(train, "text_column", form.column, candidates, USUAL_TEXT_COLUMNS)
    choose_column(test, "text_column", column, [], ())
    splits = {split: _column(column, table) for split, table in (("train", train), ("test", test))}
    return write_text(folder, form, splits, groups)


def _column(name: str, table: Table) -> Documents:
    return Documents(f"column {name!r} of {table.place}", lambda: table.column(name))


def _rows(count: int) -> str:
    return f"all of its {count:,} rows are empty" if count else "it has no rows"


def _shown(cell: Any) -> str:
    return repr(cell) if cell is None or isinstance(cell, (int, float)) else f"a {type(cell).__name__}"
