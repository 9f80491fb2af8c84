"""Code of a user's own that is told of every round: ``callbacks: [module:Class]``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from algorithms import ServerState
from cluster.references import UserError, load_reference


class CallbackError(UserError):
    """What ``callbacks`` names is no class of callbacks."""


class Callback:
    """What a run tells; subclass it, or have methods of these names. It is made anew for every run.

    It may look and write elsewhere: what it is given are copies, and nothing it returns is read. What it
    raises ends the run, which can be resumed.
    """

    def on_round(self, line: Mapping[str, Any], state: ServerState) -> None:
        """A round's line has been stored.

        Args:
            line: As in ``rounds.jsonl``.
            state: The server's state after that round.
        """

    def on_end(self, result: Mapping[str, Any]) -> None:
        """The run has ended, and ``result`` is what ``result.json`` holds."""


class Callbacks:
    """The callbacks of a run, in their order.

    Args:
        references: Their classes, ``module:Class``.

    Raises:
        CallbackError: One of them is no such class.
    """

    def __init__(self, references: Sequence[str]) -> None:
        self._named: dict[str, Any] = {}
        for place, reference in enumerate(references):
            key = f"callbacks.{place}"
            kind = load_reference(key, reference, CallbackError)
            if not (isinstance(kind, type) and hasattr(kind, "on_round")):
                raise CallbackError(f"{key}: {reference} is no class with a method on_round(line, state)")
            with _naming(f"{key} = {reference}"):
                self._named[f"{key} = {reference}"] = kind()

    def round(self, line: Mapping[str, Any], state: ServerState) -> None:
        """Tell of a round whose line has been stored."""
        for name, callback in self._named.items():
            mask = None if state.mask is None else state.mask.clone()
            arrays = {key: array.clone() for key, array in state.arrays.items()}
            own = replace(state, weights=state.weights.clone(), mask=mask, arrays=arrays)
            with _naming(f"{name}, round {line['round']}"):
                callback.on_round(MappingProxyType(copy.deepcopy(dict(line))), own)

    def end(self, result: Mapping[str, Any]) -> None:
        """Tell that the run has ended."""
        for name, callback in self._named.items():
            if hasattr(callback, "on_end"):
                with _naming(f"{name}, the end"):
                    callback.on_end(MappingProxyType(copy.deepcopy(dict(result))))


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Say of an exception of the user's own code where it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by {place}")
        raise
