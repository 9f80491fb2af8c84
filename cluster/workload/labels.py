"""What labels mean: names of classes, codes, or ids; decided by the training split, kept by the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.references import DataError

#: Integers from here on that leave nine of ten codes unused are ids, not codes: every one is a class.
_IDS_FROM = 100_000


@dataclass(frozen=True)
class LabelCodes:
    """The classes of a data set, and the code of every label as it is stored.

    Attributes:
        classes: Names in the order of the codes.
        codes: Code of each stored label: texts by name, integers as they are, ids in ascending order.
    """

    classes: list[str]
    codes: dict[Any, int]

    @classmethod
    def named(cls, names: Sequence[str], place: str) -> LabelCodes:
        """Codes of classes that have names, in their order."""
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if list(names).count(name) > 1})
            raise DataError(f"{place}: the class names hold {twice[:5]} more than once")
        return cls(list(names), {name: code for code, name in enumerate(names)})

    @classmethod
    def counted(cls, names: Sequence[str], place: str) -> LabelCodes:
        """Codes of integer labels whose classes have names beside them."""
        return cls(cls.named(names, place).classes, {code: code for code in range(len(names))})

    @classmethod
    def of(cls, values: Sequence[Any], declared: Sequence[str], place: str) -> LabelCodes:
        """What the labels of a training split mean.

        Args:
            values: Labels as they are stored: texts, those of named classes included, or integers.
            declared: Names of classes in their own order, whether they occur or not; other texts follow in
                alphabetical order.
            place: Where they are from, for messages.

        Raises:
            DataError: Labels that are neither, both, negative, or missing.
        """
        kind = _kind(values, place)
        if kind is str:
            return cls.named([*declared, *sorted(set(values) - set(declared))], place)
        found = sorted(set(values))
        if found[0] < 0:
            raise DataError(
                f"{place} lie in {found[0]}..{found[-1]}; allowed are codes from 0 on"
                + (": -1 often means that there is no label" if found[0] == -1 else "")
                + "; store others as texts"
            )
        if found[-1] >= max(_IDS_FROM, 10 * len(found)):
            return cls([str(one) for one in found], {one: code for code, one in enumerate(found)})
        return cls.counted([str(code) for code in range(found[-1] + 1)], place)

    def encode(self, values: Sequence[Any], place: str) -> np.ndarray:
        """int64 codes of labels as they are stored.

        Raises:
            DataError: They are of another kind than those of the training split, or unknown to it.
        """
        kind, known = _kind(values, place), type(next(iter(self.codes)))
        if kind is not known:
            have, named = ("texts", "integers") if kind is str else ("integers", "named classes or texts")
            raise DataError(
                f"{place} are {have} such as {values[0]!r}, those of the training split {named} such as "
                f"{next(iter(self.codes))!r}: which belong together cannot be known; "
                "store both alike"
            )
        try:
            return np.array([self.codes[value] for value in values], np.int64)
        except KeyError:
            unknown = sorted(set(values) - set(self.codes))
        if kind is str or max(self.codes) >= len(self.codes):
            raise DataError(
                f"{place} holds {unknown[:5]}, which the training split does not: {_some(self.classes)}"
            )
        raise DataError(
            f"{place} lie in {min(values)}..{max(values)}; allowed are 0..{len(self.codes) - 1}, "
            f"because there are {len(self.codes)} classes"
        )


def names_of(codes: Iterable[Any], names: Sequence[str], place: str) -> list[str]:
    """The class names that integer codes stand for.

    Raises:
        DataError: A code without a name, such as -1 for a sample without a label.
    """
    found = []
    for row, code in enumerate(codes):
        if not isinstance(code, int) or not 0 <= code < len(names):
            raise DataError(
                f"{place}: row {row} holds {code!r}; allowed are 0..{len(names) - 1}, because there are "
                f"{len(names)} classes" + (" (-1 means that there is no label)" if code == -1 else "")
            )
        found.append(names[code])
    return found


def group_codes(values: Sequence[Any], place: str) -> tuple[np.ndarray, list[str]]:
    """Groups as int64 codes, and their names in the order of the codes.

    Raises:
        DataError: A missing value, or values that cannot be ordered.
    """
    for row, value in enumerate(values):
        if value is None or value != value:
            raise DataError(f"the groups of {place} have no value in row {row}; every sample needs one")
    try:
        names = sorted(set(values))
    except TypeError as error:
        raise DataError(f"the groups of {place} are not of one kind that has an order ({error})") from error
    code = {value: index for index, value in enumerate(names)}
    return np.array([code[value] for value in values], np.int64), [str(value) for value in names]


def _kind(values: Sequence[Any], place: str) -> type:
    """``str`` or ``int``: what all labels are. Missing ones, fractions and mixtures are refused."""
    for row, value in enumerate(values):
        if not isinstance(value, (int, str)) or isinstance(value, str) != isinstance(values[0], str):
            hint = ": convert them to integers" if isinstance(value, float) and value.is_integer() else ""
            raise DataError(
                f"{place}: row {row} holds {value!r}; allowed are integers or texts, never both{hint}"
            )
    return str if isinstance(values[0], str) else int


def _some(classes: Sequence[str]) -> str:
    """The first classes, and how many more there are."""
    more = f" and {len(classes) - 20} more" if len(classes) > 20 else ""
    return f"{list(classes[:20])}{more}"
