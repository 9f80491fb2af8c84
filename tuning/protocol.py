"""The protocol: what every method was given and spent, which configuration is best, and what that is worth.

Every method gets the same budget of local training, a stage or a warm-up of its own included; trial 0 is its
published default; a configuration is selected on validation data in the last round, by what selects; the
selected one is run anew on fresh seeds, the same for all methods, and only these runs are judged on test
data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from cluster.execution import complete
from cluster.measures import Measure
from cluster.statistics import Difference, Interval, expected_best, mean_interval, paired_differences
from cluster.workload.objectives import selecting
from tuning.folder import StudyFolder
from tuning.search import LOST, Search, cost_of
from tuning.study import Contender, Plan

State = Literal["finished", "pruned", "failed", "running"]

_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}

#: Share of the uplink that a compromise on the front saves at least.
_SAVES = 0.02


@dataclass(frozen=True)
class Tried:
    """One configuration that a method was given.

    Attributes:
        number: The trial's number; 0 is the published default.
        state: How it ended.
        values: Its configuration, by key.
        value: What selects, on validation data: in the last round, or when a pruned trial was decided on.
        uplink_bytes: Bytes its clients sent.
        client_rounds: Trainings of a client for the experiment's local epochs; longer ones count as more.
        rounds: Rounds computed.
        seconds: Time its rounds took.
        reason: Why it failed.
        steps: Local steps of its clients.
        flops: Ideal sparse training FLOPs.
        lost: It failed though tried twice, for nothing that its configuration would explain.
    """

    number: int
    state: State
    values: dict[str, Any]
    value: float | None
    uplink_bytes: int
    client_rounds: float
    rounds: int
    seconds: float
    reason: str | None
    steps: int = 0
    flops: float = 0.0
    lost: bool = False

    @classmethod
    def of(cls, trial: FrozenTrial) -> Tried:
        """Read from the storage."""
        cost = cost_of(trial)
        return cls(
            number=trial.number,
            state=_STATES[trial.state],
            values=dict(trial.params),
            value=trial.values[0] if trial.values else None,
            uplink_bytes=cost.uplink_bytes,
            client_rounds=cost.client_rounds,
            rounds=cost.rounds,
            seconds=cost.seconds,
            reason=trial.user_attrs.get("reason"),
            steps=cost.steps,
            flops=cost.flops,
            lost=bool(trial.user_attrs.get(LOST)),
        )


@dataclass(frozen=True)
class MethodResult:
    """What a study found out about one method.

    Attributes:
        contender: The method.
        tried: Every trial that was begun, by number.
        finals: Results of the best configuration on fresh seeds, by seed.
        importance: Share of the variance of what selects that each tuned key explains; empty where unknown.
    """

    contender: Contender
    tried: list[Tried]
    finals: dict[int, dict[str, Any]]
    importance: dict[str, float]

    @property
    def best(self) -> Tried | None:
        """See :func:`select`."""
        return select(self.tried, self.selects)

    @property
    def selects(self) -> Measure:
        """What configurations are selected by."""
        return selecting(self.contender.config)

    def count(self, state: State) -> int:
        """Trials that ended so."""
        return sum(trial.state == state for trial in self.tried)

    @property
    def client_rounds(self) -> float:
        """Client-rounds that the search really spent."""
        return sum(trial.client_rounds for trial in self.tried)

    @cached_property
    def curve(self) -> tuple[list[float], list[float]]:
        """Client-rounds and best value to expect after 1, 2, ... trials, over all orders of the trials.

        k of n trials drawn at random cost k times the mean on average. A failed trial is worth 0 where what
        selects is a share, else as much as the worst.
        """
        ended = [trial for trial in self.tried if trial.state != "running" and not trial.lost]
        if not ended:
            return [], []
        mean = sum(trial.client_rounds for trial in ended) / len(ended)
        merit, known = self.selects.merit, [trial.value for trial in ended if trial.value is not None]
        if self.selects.unit == "share" and self.selects.better == "higher":
            failed = 0.0
        elif known:
            failed = min(map(merit, known))
        else:
            return [], []
        best = expected_best([failed if t.value is None else merit(t.value) for t in ended])
        return [mean * (turn + 1) for turn in range(len(ended))], [merit(value) for value in best]

    def boundaries(self) -> dict[str, str]:
        """Tuned keys whose best value lies on an end of its range, and which."""
        if self.best is None:
            return {}
        found = {
            key: self.contender.space[key].boundary(value)
            for key, value in self.best.values.items()
            if key in self.contender.space
        }
        return {key: end for key, end in found.items() if end is not None}

    def front(self) -> list[Tried]:
        """Finished trials that no other beats in both what selects and uplink bytes, by bytes.

        A worse trial counts only where it saves more than 2 % of the bytes: updates of one sparsity
        differ by a few, however they were tuned, and else every one of them would be a compromise.
        """
        front, left = [], self.tried
        while (best := select(left, self.selects)) is not None:
            front.append(best)
            left = [trial for trial in left if trial.uplink_bytes < (1 - _SAVES) * best.uplink_bytes]
        return front[::-1]


def select(tried: list[Tried], selects: Measure) -> Tried | None:
    """The best finished trial; of equals the one with fewer bytes, then the earlier one."""
    finished = [(trial, trial.value) for trial in tried if trial.state == "finished"]
    ranked = [
        (selects.merit(value), -trial.uplink_bytes, -trial.number, trial)
        for trial, value in finished
        if value is not None
    ]
    return max(ranked, key=lambda entry: entry[:3])[3] if ranked else None


def collect(plan: Plan, folder: StudyFolder, searches: Mapping[str, Search]) -> dict[str, MethodResult]:
    """What is known of every method so far."""
    results = {}
    for label, search in searches.items():
        tried = [Tried.of(trial) for trial in search.trials()]
        best, finals = select(tried, plan.selects), {}
        if best is not None:
            for seed in plan.final_seeds:
                config = plan.contenders[label].final_config(best.values, seed)
                done = complete(config, folder.final(label, best.number, seed))
                if done is not None:
                    finals[seed] = done.summary
        results[label] = MethodResult(plan.contenders[label], tried, finals, search.importance())
    return results


def on_test(plan: Plan, results: Mapping[str, MethodResult]) -> dict[str, list[float]]:
    """What selects, on test data, of the seeds that every method has finished, in order of seeds."""
    judged = {label: result for label, result in results.items() if result.finals}
    seeds = [seed for seed in plan.final_seeds if all(seed in r.finals for r in judged.values())]
    if not seeds:
        return {}
    return {label: [r.finals[seed][plan.selects.key] for seed in seeds] for label, r in judged.items()}


def intervals(values: Mapping[str, list[float]]) -> dict[str, Interval]:
    """Means over seeds and their 95 % intervals."""
    return {label: mean_interval(own) for label, own in values.items()}


def differences(plan: Plan, values: Mapping[str, list[float]]) -> dict[str, Difference]:
    """How much each other method is above the reference, paired by seed and Holm-corrected together."""
    return paired_differences(values, plan.reference) if plan.reference in values else {}
