"""The actor that plays clients: trains, encodes to real bytes, decodes them again and folds.

``ClientHost`` is a plain class: the inline engine holds one, the Ray engine makes each an actor.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.core.masks import target_count
from cluster import seeding
from cluster.clients.billing import seconds_of_weights
from cluster.clients.gpu import GPU_MEMORY_CURE, GpuError, GpuMemory, device_for
from cluster.clients.heap import keep_freed_memory
from cluster.clients.local_training import LocalSettings, Trained, Trainer
from cluster.clients.passes import set_up_cuda
from cluster.clients.uplinks import make_uplink, no_update
from cluster.exchange import Assignment, Broadcast, ClientError, ClientReport, EvaluationChunk, HostSetup
from cluster.simulation.byzantine import Byzantine
from cluster.simulation.devices import Devices
from cluster.simulation.shift import period_of
from cluster.trained_model import TrainedModel
from cluster.transport.downlink import Part
from cluster.transport.uplink import Posted, Sending, Withheld
from cluster.workload.datasets import Split, open_dataset
from cluster.workload.inputs import from_read_only
from cluster.workload.objectives import Sums
from cluster.workload.own_rows import few

_logger = logging.getLogger("sparsyfed.client")


class ClientHost:
    """Plays clients on one resident model.

    Args:
        setup: What there is to play.
        gpus: GPUs this host was given, a share of one or whole ones; by default what the configuration gives
            every actor. Above 0 it trains on CUDA.

    Raises:
        GpuError: It was given a GPU and torch sees none.
    """

    def __init__(self, setup: HostSetup, gpus: float | None = None) -> None:
        config = self.config = setup.config
        torch.set_num_threads(config.threads)
        keep_freed_memory()
        share = config.gpus_per_actor if gpus is None else gpus
        self._device = device_for(share)
        self._memory: GpuMemory | None = None
        if self._device.type == "cuda":
            set_up_cuda()
            self._memory = GpuMemory(share)
        dataset = open_dataset(setup.folder)
        self._setup = setup
        self._dataset, held_out = dataset, setup.validation
        self._validation = Split(dataset.train.inputs[held_out], dataset.train.targets[held_out], None)
        self._method, self._byzantine = config.method, Byzantine(config)
        model = TrainedModel.of(config, dataset, setup.base).module
        local = config.local
        settings = LocalSettings(
            seed=config.seed,
            epochs=local.epochs,
            batch_size=local.batch_size,
            weight_decay=local.weight_decay,
            proximal=local.proximal,
            precision=config.precision,
            cuda_graphs=config.cuda_graphs,
            optimizer=config.build_local_optimizer(),
            clip_norm=local.clip_norm,
            lr_end=local.lr_final if local.lr_schedule == "cosine_visit" else None,
            crop=local.augment.crop,
            flip=local.augment.flip,
            attack=config.build_attack(),
        )
        self._trainer = Trainer(
            model, self._method, settings, dataset.train, self._device, config.build_objective()
        )
        self._uplink = make_uplink(config, self._trainer.layout)
        self._sending = ThreadPoolExecutor(1, "uplink") if self._device.type == "cuda" else None
        self._total: Any = None
        self._round = -1
        self._broadcast: Broadcast | None = None
        self._known: np.ndarray | None = None  # what updates of it need not hold

    def play(self, broadcast: Broadcast, assignments: Sequence[Assignment]) -> list[ClientReport]:
        """Play each client and fold its decoded update into this host's partial total of the round.

        On a GPU one client's update crosses the wire while the next client trains.

        Raises:
            ClientError: A client's code raised, and ``on_client_error`` is ``stop``.
            GpuError: The first client took more GPU memory than this host's share.
        """
        broadcast = self._start_round(broadcast)
        if self._sending is None:
            return [
                self._send(broadcast, assignment, *self._train(broadcast, assignment))
                for assignment in assignments
            ]
        reports, sending = [], None
        for assignment in assignments:
            trained = self._train(broadcast, assignment)
            if sending is not None:  # the arrays of one more client are safe from the next one
                reports.append(sending.result())
            sending = self._sending.submit(self._send, broadcast, assignment, *trained)
        return reports if sending is None else [*reports, sending.result()]

    def collect(self, round_number: int) -> Any:
        """Hand over the round's partial total and forget it; None when this host holds none of that round."""
        total = self._total if self._round == round_number else None
        self._total, self._round, self._broadcast = None, -1, None
        return total

    def evaluate(
        self, broadcast: Broadcast, chunks: Sequence[EvaluationChunk]
    ) -> list[tuple[EvaluationChunk, Sums]]:
        """What the objective adds up of the global model w_t on each chunk.

        The chunk of a client whose local training fails and is skipped is left out.

        Raises:
            ClientError, GpuError: As in :meth:`play`.
        """
        models: dict[str | None, np.ndarray] = {}
        model: np.ndarray | None
        results = []
        for chunk in chunks:
            started = time.perf_counter()
            if chunk.after is not None:
                assert chunk.client is not None
                model = self._locally_trained(broadcast, chunk.client, chunk.after)
                if model is None:
                    continue
            else:
                if chunk.tier not in models:
                    models[chunk.tier] = self._at_budget(broadcast, chunk.tier)
                model = models[chunk.tier]
            if chunk.attacked:
                sums = self._attacked(model, chunk)
            else:
                sums = self._trainer.evaluate(model, self._split(chunk), chunk.start, chunk.stop)
            results.append((replace(chunk, seconds=time.perf_counter() - started), sums))
        return results

    def _attacked(self, model: np.ndarray, chunk: EvaluationChunk) -> Sums:
        """The sums under attack, on the chunk's rows of those of its split that are attacked."""
        rows = self._setup.attacked[chunk.split][chunk.start : chunk.stop]
        splits = {"test": self._dataset.test, "val": self._validation, "train": self._dataset.train}
        whole, place = splits[chunk.split], list(splits).index(chunk.split)
        return self._trainer.evaluate_attacked(
            model,
            Split(whole.inputs[rows], whole.targets[rows], None),
            self.config.build_evaluation_attack(),
            self.config.evaluate_attack.restarts,
            seeding.integer(self.config.seed, "robustness", place + 1, chunk.start),
        )

    def _split(self, chunk: EvaluationChunk) -> Split:
        """What a chunk's rows are rows of."""
        train = self._dataset.train
        if chunk.split == "group":
            assert train.groups is not None
            held = self._setup.validation
            rows = held[train.groups[held] == chunk.client]
            return Split(train.inputs[rows], train.targets[rows], None)
        if chunk.split != "own":
            return self._validation if chunk.split == "val" else self._dataset.test
        assert self._setup.own is not None and chunk.client is not None  # noqa: PT018
        rows = self._setup.own.client(chunk.client)
        return Split(train.inputs[rows], train.targets[rows], None)

    def _at_budget(self, broadcast: Broadcast, tier: str | None) -> np.ndarray:
        """Effective weights of the global model, cut to a tier's budget where one is named."""
        layout, weights = self._trainer.layout, torch.from_numpy(broadcast.exact.copy())
        if tier is not None:
            sparsity = self.config.devices.tiers[tier].sparsity
            assert sparsity is not None
            if self._method.confined:
                part = self._support(broadcast, None, sparsity)
                weights[: len(part)].masked_fill_(~part, 0.0)
                return self._method.effective_weights(weights, layout).numpy()
            keep = target_count(layout.prunable_size, sparsity)
            mask = None if broadcast.mask is None else torch.from_numpy(broadcast.mask.copy())
            self._method.cut(weights[: layout.prunable_size], mask, keep, layout)
        return self._method.effective_weights(weights, layout).numpy()

    def _support(self, broadcast: Broadcast, place: int | None, sparsity: float) -> Tensor:
        """The part of the evaluated model that a budget is given, bool[trained]."""
        layout, told = self._trainer.layout, broadcast.instructions
        weights = torch.from_numpy(broadcast.exact.copy())
        part = self._method.submodel(weights, told, place, 1.0 - sparsity, layout)
        return torch.ones(layout.trained_size, dtype=torch.bool) if part is None else part

    def _part(self, broadcast: Broadcast, client: int, sparsity: float) -> Part | None:
        """What a client would be sent of the evaluated model; None for all of it."""
        support = self._support(broadcast, client, sparsity).numpy()
        if support.all():
            return None
        weights = broadcast.weights.copy()
        weights[: len(support)][~support] = 0.0
        return Part(weights, support if self._method.confined else None, 0, 0)

    def _locally_trained(self, broadcast: Broadcast, client: int, shots: int) -> np.ndarray | None:
        """What a client makes of the evaluated model: effective weights of what it would send next.

        None where it failed and is skipped. A new client adapts to ``shots`` rows a class in a few steps.

        It trains on the data that it holds in the round that is evaluated, before a shift that follows.
        Nothing of it is folded, and every visit draws from streams of its own: training does not notice.
        """
        sparsity = Devices(self.config).sparsity(client, self._method.sparsity, broadcast.instructions.round)
        evaluated = broadcast.instructions.round - 1
        rows = self._rows(client, period_of(self.config.shift, evaluated))
        if shots:
            section, labels = self.config.evaluate_clients, self._dataset.train.targets
            rows = few(rows, labels, shots, self.config.partition_seed, client)
            told = replace(broadcast.instructions, steps=section.adapt_steps, epochs=None, adapts=True)
            broadcast = replace(broadcast, instructions=told)
        try:
            part = self._part(broadcast, client, sparsity)
            kept_before = broadcast.kept.get(client)
            trained = self._trainer.visit(client, rows, sparsity, broadcast, kept_before, part)
        except Exception as error:
            self._skip(error, client, evaluated, "evaluation")
            return None
        layout = self._trainer.layout
        weights = torch.from_numpy(trained.values.copy())
        received = torch.from_numpy((broadcast if part is None else part).weights.copy())
        if self._method.uploads_differences:
            weights[: layout.trained_size] += received[: layout.trained_size]
        kept = {name: torch.from_numpy(array) for name, array in trained.kept.items()}
        return self._method.personal_weights(weights, received, kept, layout).numpy()

    def _start_round(self, broadcast: Broadcast) -> Broadcast:
        """The round's broadcast: the first copy that came, which the trainer has received already."""
        if self._total is None or self._round != broadcast.instructions.round:
            self._total = no_update(self.config, self._uplink, self._trainer.layout, broadcast)
            self._round = broadcast.instructions.round
        if self._broadcast is None or not _same(self._broadcast, broadcast):
            self._broadcast = broadcast
            known = self._method.known(from_read_only(broadcast.weights), self._trainer.layout)
            self._known = None if known is None else known.numpy()
        return self._broadcast

    def _rows(self, client: int, period: int) -> np.ndarray:
        """Rows of the training split that a client holds after so many shifts of the data."""
        partition = self._setup.shifted[period - 1] if period else self._setup.partition
        return partition.client(client)

    def _seconds(self, broadcast: Broadcast, assignment: Assignment, samples: int) -> np.ndarray:
        """What weights cost a client's device, see :class:`Visit`, float32[layers + 1]."""
        local, trainer = self.config.local, self._trainer
        planned = broadcast.instructions.local_samples(samples, local.batch_size, local.epochs)
        spares = self.config.devices.flops == "sparse"
        return seconds_of_weights(assignment.device, trainer.flops, trainer.layout, planned, spares=spares)

    def _train(self, broadcast: Broadcast, assignment: Assignment) -> tuple[Trained | str, float]:
        """A client's update, or why it was skipped, and the seconds that it took."""
        rows, started = self._rows(assignment.client, broadcast.period), time.perf_counter()
        trained: Trained | str
        part = None if assignment.part is None else broadcast.parts[assignment.part]
        try:
            seconds = self._seconds(broadcast, assignment, len(rows))
            trained = self._trainer.visit(
                assignment.client,
                rows,
                assignment.sparsity,
                broadcast,
                assignment.kept,
                part,
                seconds,
                flipped=self._byzantine.flips_labels(assignment.client) and len(self._dataset.classes),
            )
            self._corrupt(broadcast, assignment, trained)
            if self._memory is not None:
                self._memory.check(assignment.client)
        except Exception as error:
            trained = self._skip(error, assignment.client, broadcast.instructions.round, "train")
        return trained, time.perf_counter() - started

    def _corrupt(self, broadcast: Broadcast, assignment: Assignment, trained: Trained) -> None:
        """Have an attacker send something else than what it trained."""
        size = self._trainer.layout.trained_size
        base = broadcast.base(assignment.part)
        if self._method.uploads_differences or base is None:
            base = np.zeros(size, np.float32)
        number = broadcast.instructions.round
        self._byzantine.corrupt(
            assignment.client, number, trained.values[:size], base[:size], trained.support
        )

    def _send(
        self, broadcast: Broadcast, assignment: Assignment, trained: Trained | str, seconds: float
    ) -> ClientReport:
        """Have an update cross the wire, and fold what arrives where that can be told here."""
        if isinstance(trained, str):
            return self._failed(broadcast, assignment, trained)
        stage = "encode"
        try:
            marks = [time.perf_counter()]
            held, known = broadcast.held(assignment.part), self._known
            measured, withheld = trained.measured, None
            weight = self.config.weight(measured.samples)
            sending = Sending(assignment.client, weight, broadcast.grid, broadcast.shared, broadcast.keys)
            try:
                posted = self._uplink.encode(
                    trained.values, trained.support, held, known, trained.marks, sending
                )
            except Withheld as own:
                posted, withheld = Posted(b"", 0, 0.0), str(own)
            marks.append(time.perf_counter())
            stage = "decode"
            received = None if withheld else self._uplink.decode(posted.message, held, known)
            marks.append(time.perf_counter())
            stage = "fold"
            # From the bytes and FLOPs that the visit really caused.
            sparse = self.config.devices.flops == "sparse"
            flops = measured.flops_sparse_total if sparse else measured.flops_dense
            device, sent = assignment.device, len(posted.message)
            visit_s = device.duration(assignment.downlink_bytes, flops, sent)
            visit_s += assignment.waits_s
            late, here = visit_s > assignment.deadline, visit_s < assignment.fold_before
            refused = None if late else withheld
            if here and not late and received is not None:
                assert self._total is not None
                base = broadcast.base(assignment.part)
                refused = self._uplink.fold(
                    self._total, sending.client, received, sending.samples, base, broadcast.clip
                )
            marks.append(time.perf_counter())
        except Exception as error:
            reason = self._skip(error, assignment.client, broadcast.instructions.round, stage)
            return self._failed(broadcast, assignment, reason)
        phases = (seconds, marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2])
        return ClientReport(
            client=assignment.client,
            measured=measured,
            seconds=sum(phases),
            phases=phases,
            uplink_bytes=sent,
            uplink_nonzero_bytes=posted.nonzero_bytes,
            upload_density=posted.density,
            refused=refused,
            visit_s=visit_s,
            joules=device.energy(0, flops, sent),
            late=late,
            folded=here and not late and refused is None,
            message=None if here or late or withheld else posted.message,
            kept=trained.kept,
            kept_if_late=trained.kept_if_late,
            clamped=posted.clamped,
        )

    def _failed(self, broadcast: Broadcast, assignment: Assignment, reason: str) -> ClientReport:
        samples = len(self._rows(assignment.client, broadcast.period))
        return ClientReport.failed(assignment.client, samples, len(self._trainer.layout.prunable), reason)

    def _skip(self, error: Exception, client: int, round_number: int, stage: str) -> str:
        """Why a client that failed is skipped; raises where ``on_client_error`` or the error forbids it."""
        if isinstance(error, GpuError):
            raise error
        if isinstance(error, torch.OutOfMemoryError):
            raise GpuError(f"client {client} found no more GPU memory ({error}); {GPU_MEMORY_CURE}") from None
        what = f"stage {stage}: {type(error).__name__}: {error}"
        failure = f"client {client} failed in round {round_number}, {what}"
        # A fold that was interrupted may have left half an update in the total.
        if self.config.on_client_error != "skip" or stage == "fold":
            raise ClientError(f"{failure}\n{traceback.format_exc()}") from None
        _logger.warning(failure, exc_info=True)
        return f"failed in {what}"


def _same(first: Broadcast, second: Broadcast) -> bool:
    """Whether two broadcasts are copies of one: arrays out of the object store share its memory."""
    told = ("instructions", "lr", "limit", "samples", "period")
    if any(getattr(first, name) != getattr(second, name) for name in told):
        return False
    mine, other = ([one.weights, *(part.weights for part in one.parts)] for one in (first, second))
    return len(mine) == len(other) and all(
        a.ctypes.data == b.ctypes.data or np.array_equal(a, b) for a, b in zip(mine, other, strict=True)
    )
