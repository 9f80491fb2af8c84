"""Synchronous rounds of one cohort: over-selection and a deadline leave out who comes too late."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from algorithms import Instructions, ServerState
from cluster import seeding
from cluster.clients.uplinks import no_update
from cluster.exchange import Broadcast, EvaluationChunk
from cluster.rounds.engine import Outcome
from cluster.rounds.schedule import IDLE_S, Round, Schedule
from cluster.rounds.secure import SecureRound
from cluster.simulation.clock import first_arrivals
from cluster.transport.secure_uplink import SecureUplink


class Synchronous(Schedule):
    """Rounds of one cohort: over-selection and a deadline leave out who comes too late.

    Of ``over_selection`` x cohort clients that are asked, the first cohort updates count. A device that is
    not available is not reached, one that drops out downloads the model and never answers, and one that
    cannot make the deadline even with an empty upload is not troubled at all. The round is over when the
    cohort is complete or nobody is left to wait for, else at the deadline; without one the server learns who
    is gone.

    Who is among the first is known when all are trained. What an actor can tell by itself it folds at once:
    an update that comes before all but ``cohort`` clients possibly can. The few others travel to the driver.
    """

    def round(
        self, state: ServerState, chunks: Sequence[EvaluationChunk], meanwhile: Callable[[], None]
    ) -> Round:
        """See :class:`Schedule`."""
        timing, started = self.timing, self.clock.now
        instructions = self.instruct(state)
        number, wanted = instructions.round, instructions.cohort or self.config.cohort
        rng = seeding.generator(self.config.seed, "cohort", number)
        planned = math.ceil(wanted * timing.over_selection - 1e-9)
        asked = self.draw(planned, number, rng)
        if self.varies:
            wanted = len(asked)
        reached = asked[self.devices.available(asked, started)]
        parcel = self.sender.parcel(state)
        # Rounds ask as many as this one: nobody's place depends on who was there.
        before = (number - self.method.first_round) * (planned if self.varies else len(asked))
        assignments, bounds = self.assignments(reached, parcel, instructions, before)
        deadline = math.inf if timing.deadline is None else timing.deadline
        punctual = bounds <= deadline
        sent = [assignment for assignment, may in zip(assignments, punctual, strict=True) if may]
        clients = np.array([assignment.client for assignment in sent], np.int64)
        self.sender.deliver(clients, parcel)
        gone = self.devices.drop_outs(clients, number)
        secure = None
        if self.config.privacy.secure.asked:
            secure = SecureRound.of(self.config, number, self.uploading(sent))
        waits_s = 0.0 if secure is None else secure.setup_s
        bounds = np.sort(bounds[punctual][~gone]) + waits_s
        fold_before = float(bounds[wanted]) if len(bounds) > wanted else math.inf
        playing = [
            replace(assignment, deadline=deadline, fold_before=fold_before, waits_s=waits_s)
            for assignment in self.uploading([one for one, lost in zip(sent, gone, strict=True) if not lost])
        ]
        broadcast = self.broadcast(parcel, instructions, clients[~gone], chunks)
        if secure is not None:
            broadcast = replace(broadcast, shared=self._shared(instructions), keys=secure.keys)
        prepared = time.perf_counter()
        outcome = self.engine.run(broadcast, playing, chunks, meanwhile)
        arrivals = {r.client: r.visit_s for r in outcome.reports if r.visit_s < math.inf}
        first = first_arrivals(((s, client) for client, s in arrivals.items()), wanted, deadline)
        self._settle(outcome, broadcast, set(first), {a.client: a.part for a in playing})
        lost = secure is not None and not self._open(secure, outcome, broadcast)
        outcome.reports[:] = self.kept.commit(number, outcome.reports)
        self.clock.now = started + self._length(first, arrivals, wanted, len(sent))
        downlink = self.downlink(sent, parcel)
        if secure is not None:
            summed = [report.client for report in outcome.reports if report.accepted]
            self.clock.now += secure.recovery_s(summed)
            outcome.beside_bytes = secure.bytes_up(len(summed))
            downlink = replace(downlink, total=downlink.total + secure.bytes_down(len(summed)))
        metrics = {
            "time/simulated_s": self.clock.now,
            "time/round_simulated_s": self.clock.now - started,
            "clients/unavailable": len(asked) - len(reached),
            "clients/stragglers": len(reached) - len(sent),
            "clients/dropped": int(gone.sum()),
            "clients/late": len(arrivals) - len(first),
        }
        if broadcast.bits is not None:
            metrics["comm/clamped_values"] = sum(report.clamped for report in outcome.reports)
        if secure is not None:
            metrics |= secure.metrics(outcome.reports, lost=lost)
        return Round(outcome, downlink, metrics, prepared)

    def _shared(self, instructions: Instructions) -> bool:
        """Whether all clients send the mask that both sides hold, whatever the tiers' budgets."""
        tiers = self.config.devices.kinds.values()
        return self.method.sends_mask(instructions) and all(tier.sparsity is None for tier in tiers)

    def _open(self, secure: SecureRound, outcome: Outcome, broadcast: Broadcast) -> bool:
        """Open a secure round's sum; without one all that came is left out."""
        assert isinstance(self.uplink, SecureUplink)
        outcome.total = secure.open(outcome.total, self.uplink, broadcast)
        if outcome.total is None:
            outcome.reports[:] = [replace(r, late=r.refused is None) for r in outcome.reports]
        return outcome.total is not None

    def _settle(
        self, outcome: Outcome, broadcast: Broadcast, first: set[int], parts: dict[int, int | None]
    ) -> None:
        """Fold what actors left to decide; the rest of it is late."""
        total, layout = outcome.total, self.federation.layout
        for place, report in enumerate(outcome.reports):
            if report.client not in first:
                report = replace(report, late=report.refused is None, message=None)
            elif report.message is not None:
                part = parts[report.client]
                total = total or no_update(self.config, self.uplink, layout, broadcast)
                refused = self.uplink.take(
                    total,
                    report.client,
                    report.message,
                    self.config.weight(report.samples),
                    broadcast.base(part),
                    broadcast.held(part),
                    self.known(broadcast.weights),
                    broadcast.clip,
                )
                report = replace(report, refused=refused, message=None)
            outcome.reports[place] = report
        outcome.total = total if any(report.accepted for report in outcome.reports) else None

    def _length(self, first: list[int], arrivals: dict[int, float], wanted: int, sent: int) -> float:
        """Seconds until the server has no reason to wait any longer."""
        if first and len(first) in (wanted, sent):
            return arrivals[first[-1]]
        if self.timing.deadline is not None:
            return float(self.timing.deadline)
        return arrivals[first[-1]] if first else IDLE_S
