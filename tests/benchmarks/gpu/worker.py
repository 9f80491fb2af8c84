"""A process that measures: what fails, hangs or breaks CUDA in it harms nothing that comes after.

Items run one after the other in one child process, which starts once: Python, torch and CUDA take seconds.
It leads a process group, so that a kill takes the processes that it started along, and Ctrl-C reaches the
parent alone. After a failure the next item gets a new one, as CUDA's errors stay with the process they met.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

#: Seconds that an item which can end early gets for it after a signal.
GRACE_S = 20.0

Found = dict[str, Any]


class LeftOut(Exception):
    """An item has no meaning here; the message says why."""


@dataclass(frozen=True)
class Item:
    """One thing to find out.

    Attributes:
        key: Its name in the results.
        part: ``checks``, ``speed`` or ``paper``.
        function: ``module:function`` of a :class:`Context` and the arguments; returns what it found.
        arguments: Plain values.
        seconds: About what it takes on a GPU; with less time left it is not begun.
        ends_early: Whether it ends by itself, with what it has, after SIGTERM and before its time is over.
    """

    key: str
    part: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 5.0
    ends_early: bool = False


@dataclass(frozen=True)
class Context:
    """What an item knows: the device, the end of its time (``time.monotonic``), whom to tell meanwhile."""

    device: str
    until: float
    tell: Callable[[Found], None]


@dataclass
class Outcome:
    """How an item ended (``done``, ``failed``, ``left out``, ``cut short``), why, and what it found."""

    state: str
    why: str = ""
    found: Found = field(default_factory=dict)
    seconds: float = 0.0


class Worker:
    """Runs items for one device.

    Args:
        device: ``cuda`` or ``cpu``.
        stopped: Asked all the time; true ends the item in progress.
    """

    def __init__(self, device: str, stopped: Callable[[], bool]) -> None:
        self._device, self._stopped = device, stopped
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._connection: Any = None

    def run(self, item: Item, until: float, told: Callable[[Found], None]) -> Outcome:
        """Run one item, at the longest until then; ``told`` gets what it found so far whenever that grows."""
        started = time.monotonic()
        outcome = self._run(item, until, told)
        outcome.seconds = time.monotonic() - started
        if outcome.state in ("failed", "cut short"):
            self.close()
        return outcome

    def begin(self, item: Item) -> None:
        """Have an item run by itself; nobody hears what it found."""
        self._start()
        self._connection.send((item, float("inf")))

    def _run(self, item: Item, until: float, told: Callable[[Found], None]) -> Outcome:
        self._start()
        found: Found = {}
        end, stopping = until, False
        try:
            self._connection.send((item, until))
            while (now := time.monotonic()) < end:
                if self._connection.poll(min(0.1, end - now)):
                    kind, content = self._connection.recv()
                    if kind == "done" or kind == "so far":
                        found |= content
                    if kind == "so far":
                        told(found)
                        continue
                    return Outcome(kind, "" if kind == "done" else content, found)
                if self._stopped() and not stopping:
                    if not item.ends_early:
                        return Outcome("cut short", "stopped by a signal", found)
                    stopping, end = True, min(end, now + GRACE_S)
                    os.kill(self._process.pid, signal.SIGTERM)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            if stopping:
                return Outcome("cut short", "stopped by a signal", found)
            return Outcome("failed", f"the process ended with status {self._process.exitcode}", found)
        return Outcome("cut short", "stopped by a signal" if stopping else "its time was over", found)

    def _start(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        self.close()
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, self._device))
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """End the process and all that it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # where it had not yet become the leader of a group
        self._process.join()
        self._connection.close()
        self._process = self._connection = None


def _serve(connection: Connection, device: str) -> None:
    os.setsid()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            item, until = connection.recv()
            connection.send(
                _answer(item, Context(device, until, lambda found: connection.send(("so far", found))))
            )


def _answer(item: Item, context: Context) -> tuple[str, Any]:
    module, _, name = item.function.partition(":")
    try:
        return "done", getattr(importlib.import_module(module), name)(context, **item.arguments)
    except LeftOut as reason:
        return "left out", str(reason)
    except BrokenPipeError:
        raise
    except Exception as error:
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"
