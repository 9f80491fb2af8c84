"""The pass of one local step (forward, loss, backward): launched op by op, or replayed as a CUDA graph.

A step of a small model is hundreds of kernels of a few microseconds each, so that launching them costs more
than running them. A graph is recorded once per actor and batch size and replayed for every client. The
method's hooks and the SGD update stay outside: a few launches over the flat vector, which may do anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from algorithms.core.layers import ActivationPruning

Precision = Literal["float32", "tf32", "bfloat16"]

#: Computes the loss of (inputs, targets) and leaves the gradient in the flat vector.
Compute = Callable[[Tensor, Tensor], Tensor]

#: What a batch's inputs are changed to before a pass; it may launch other work every time.
Change = Callable[[Tensor], Tensor]

#: Records what a function launches, without running it, and returns what runs it.
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]

#: Passes of a kind before it is recorded: libraries choose algorithms and allocate workspaces in them.
WARM_UP = 3


class CaptureError(RuntimeError):
    """The model's pass cannot be recorded as a CUDA graph; the message says what to do."""


class Passes(Protocol):
    """Runs the pass of one local step."""

    def run(self, inputs: Tensor, targets: Tensor, chosen: Tensor, change: Change | None = None) -> Tensor:
        """Loss of ``inputs[chosen]``, a scalar that the next pass may overwrite; the gradient is in place.

        Args:
            inputs: A client's model inputs, [n_i, ...].
            targets: Its targets, [n_i, ...].
            chosen: Rows of the batch, int64[batch].
            change: What the batch's inputs are changed to; None leaves them.
        """
        ...


class EagerPasses:
    """Launches every operation by itself."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def run(self, inputs: Tensor, targets: Tensor, chosen: Tensor, change: Change | None = None) -> Tensor:
        """See :class:`Passes`."""
        batch = inputs[chosen]
        return self._compute(batch if change is None else change(batch), targets[chosen])


@dataclass
class _Recording:
    """One kind of pass: its inputs, which stay in their place, and what replays it once it is recorded."""

    inputs: Tensor
    targets: Tensor
    warm: int = 0
    replay: Callable[[], Tensor] | None = None


class GraphPasses:
    """Records each kind of pass after a few warm ones, then replays it.

    Passes differ in kind by the size of the batch and by which layers draw an activation threshold.

    Args:
        compute: Must launch the same work on the same memory for equal kinds, and read nothing back.
        prunings: How the model's layers prune activations; set to draw thresholds on the device.
        capture: By default :func:`cuda_graphs`.
    """

    def __init__(
        self, compute: Compute, prunings: Iterable[ActivationPruning], capture: Capture | None = None
    ) -> None:
        self._compute, self._prunings = compute, list(prunings)
        for pruning in self._prunings:
            pruning.on_device = True
        self._capture = capture or cuda_graphs()
        self._recordings: dict[Sequence[Any], _Recording] = {}

    def run(self, inputs: Tensor, targets: Tensor, chosen: Tensor, change: Change | None = None) -> Tensor:
        """See :class:`Passes`."""
        kind = (len(chosen), tuple((pruning.draws, pruning.density) for pruning in self._prunings))
        recording = self._recordings.get(kind)
        if recording is None:
            recording = _Recording(
                inputs.new_empty((len(chosen), *inputs.shape[1:])),
                targets.new_empty((len(chosen), *targets.shape[1:])),
            )
            self._recordings[kind] = recording
        torch.index_select(inputs, 0, chosen, out=recording.inputs)
        torch.index_select(targets, 0, chosen, out=recording.targets)
        if change is not None:
            recording.inputs.copy_(change(recording.inputs))
        if recording.replay is None:
            if recording.warm < WARM_UP:
                recording.warm += 1
                return self._compute(recording.inputs, recording.targets)
            batch = (recording.inputs, recording.targets)
            recording.replay = self._capture(lambda: self._compute(*batch))
        loss = recording.replay()
        for pruning in self._prunings:
            pruning.drawn = True  # a replay runs no Python
        return loss


def cuda_graphs() -> Capture:
    """Records CUDA graphs that share one pool of memory, since they never run at once."""
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                result = function()
        except RuntimeError as error:
            raise CaptureError(
                f"the model's training pass cannot be recorded as a CUDA graph ({error}); it must not read "
                "values back from the GPU. Set cuda_graphs=false to launch it op by op"
            ) from error

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return capture


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Training arithmetic: TF32 products, or bfloat16 by autocast; parameters and updates stay float32."""
    if precision == "bfloat16":
        # A cache of cast weights would outlive the pass, and a graph's replay would not refresh it.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield
    elif precision == "tf32" and device.type == "cuda":
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        _allow_tf32(True, True)
        try:
            yield
        finally:
            _allow_tf32(*before)
    else:
        yield


def set_up_cuda() -> None:
    """Deterministic kernels and true float32 for this process, evaluation included."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    _allow_tf32(False, False)  # torch allows it in convolutions by default


def _allow_tf32(products: bool, convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions
