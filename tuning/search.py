"""One method's search: what is asked next, what is told, and when its budget is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from cluster.records.run_folder import RunFolder
from cluster.statistics import Interval
from tuning import dashboard
from tuning.budget import epochs_of
from tuning.spaces import Dimension
from tuning.storage import make_sampler, open_study
from tuning.study import Contender, Plan

#: Attribute of a trial that is to end early: the round after which that was decided.
PRUNED_AT = "pruned_at"

#: Attribute of a trial that failed though tried twice, its configuration not being at fault.
LOST = "lost"

#: Different configurations that an importance is computed from, at least.
_ENOUGH_FOR_IMPORTANCE = 4


@dataclass(frozen=True)
class Cost:
    """What a trial really spent.

    Attributes:
        client_rounds: Trainings of a client for the experiment's local epochs; longer ones count as more.
        rounds: Rounds computed.
        uplink_bytes: Bytes its clients sent.
        seconds: Time its rounds took.
        steps: Local steps of its clients.
        flops: Ideal sparse training FLOPs.
    """

    client_rounds: float
    rounds: int
    uplink_bytes: int
    seconds: float
    steps: int = 0
    flops: float = 0.0

    @classmethod
    def of(cls, path: Path) -> Cost:
        """Read from the lines of a run's folder."""
        lines = RunFolder(path).rounds()
        if not lines:
            return cls(0, 0, 0, 0.0)
        config = RunFolder(path).config()
        epochs = epochs_of(config)
        trained = sum(line["clients/trained"] * epochs(line["round"]) for line in lines)
        return cls(
            client_rounds=trained / config.local.epochs,
            rounds=sum(line["round"] > 0 for line in lines),
            uplink_bytes=sum(line["comm/uplink_bytes"] for line in lines),
            seconds=round(sum(line["time/round_s"] for line in lines), 3),
            steps=sum(line.get("clients/steps", 0) for line in lines),  # not logged by 0.1
            flops=sum(line["flops/sparse"] for line in lines),
        )


def cost_of(trial: FrozenTrial) -> Cost:
    """What was told of a trial; nothing while it runs."""
    return Cost(**trial.user_attrs["cost"]) if "cost" in trial.user_attrs else Cost(0, 0, 0, 0.0)


class Search:
    """Asks and tells one method's Optuna study. Not thread-safe: the coordinator holds a lock.

    Args:
        plan: The study.
        contender: The method.
        storage: Where its trials are kept.
        owner: Mark of the study's folder.
    """

    def __init__(self, plan: Plan, contender: Contender, storage: BaseStorage, owner: str) -> None:
        self.contender = contender
        self._plan, self._storage = plan, storage
        self._study = open_study(plan, contender.label, storage, owner)

    def trials(self) -> list[FrozenTrial]:
        """Every trial that was begun, by number."""
        return self._study.get_trials(
            deepcopy=False,
            states=(TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL),
        )

    def interrupted(self) -> list[Trial]:
        """Trials that a coordinator which is gone left running, their values complete."""
        left = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [self._suggested(Trial(self._study, trial._trial_id), trial.number) for trial in left]

    def wants_another(self) -> bool:
        """Whether the budget holds another whole trial beside those begun."""
        begun = self.trials()
        if not self.contender.space:
            return not begun  # it has one configuration
        if not self._plan.pruned:
            return len(begun) < self._plan.section.trials
        # Of a running trial it is not known yet whether it will be ended early.
        spent = [cost_of(trial).client_rounds for trial in begun if trial.state.is_finished()]
        whole = max([self._plan.whole_trial, *spent])
        running = len(begun) - len(spent)
        return sum(spent) + (running + 1) * whole <= self._plan.budget

    def ask(self) -> Trial:
        """Begin the next trial."""
        number = len(self.trials())
        return self._suggested(self._study.ask(), number)

    def report(self, trial: Trial, round_number: int, value: float) -> bool:
        """Take in what selects after a round of a trial; returns whether the trial is to end now."""
        known = self._frozen(trial)
        if PRUNED_AT in known.user_attrs:
            return True
        if self._plan.section.two_objectives or round_number in known.intermediate_values:
            return False
        return judge(trial, round_number, value, self._plan.base.rounds)

    def pruned_at(self, trial: Trial) -> int | None:
        """The round after which it was decided to end the trial, if it was."""
        return self._frozen(trial).user_attrs.get(PRUNED_AT)

    def introduce(self, root: Path) -> None:
        """Say in the dashboard what is searched; ``root`` is the folder of the whole study."""
        plan, others = self._plan, ", ".join(self._plan.contenders)
        section, base = plan.section, plan.base
        text = (
            f"# {plan.name}: {self.contender.label}\n\nOne of the methods {others}, tuned alike: "
            f"{section.trials} trials of {base.rounds} rounds of {base.cohort} clients, judged by validation "
            f"{plan.selects.title}. Trial 0 is the published default.\n"
        )
        dashboard.introduce(self._study, text, root)

    def judged(self, score: Interval) -> None:
        """Show in the dashboard what the best configuration came to on test data, over the final seeds."""
        name, half = f"test_{self._plan.selects.key}", score.high - score.mean
        text = f"{score.mean:.6g}" + ("" if math.isnan(half) else f" ± {half:.2g}")
        if self._study.user_attrs.get(name) != text:
            self._study.set_user_attr(name, text)

    def tell_finished(self, trial: Trial, value: float, cost: Cost) -> None:
        """A trial ran its planned rounds; ``value`` is what selects."""
        self._spent(trial, cost)
        sent = [float(cost.uplink_bytes)] * self._plan.section.two_objectives
        self._study.tell(trial.number, [value, *sent])

    def tell_pruned(self, trial: Trial, cost: Cost) -> None:
        """A trial was ended early."""
        self._spent(trial, cost)
        self._study.tell(trial.number, state=TrialState.PRUNED)

    def tell_failed(self, trial: Trial, reason: str, cost: Cost, *, lost: bool = False) -> None:
        """A trial cannot finish, such as one that diverged; ``lost``: for nothing its values explain."""
        trial.set_user_attr("reason", reason)
        if lost:
            trial.set_user_attr(LOST, lost)
        self._spent(trial, cost)
        self._study.tell(trial.number, state=TrialState.FAIL)

    def importance(self) -> dict[str, float]:
        """Share of the variance of what selects by key, by fANOVA; empty for too few trials."""
        finished = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        varied = {tuple(trial.params.values()) for trial in finished}
        if len(varied) < _ENOUGH_FOR_IMPORTANCE or len({trial.values[0] for trial in finished}) < 2:
            return {}
        return optuna.importance.get_param_importances(
            self._study,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
            target=lambda trial: trial.values[0],
        )

    def _spent(self, trial: Trial, cost: Cost) -> None:
        trial.set_user_attr("cost", vars(cost))

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return self._storage.get_trial(trial._trial_id)

    def _suggested(self, trial: Trial, number: int) -> Trial:
        """Give the trial its values, those that a crash in mid-ask left out included."""
        if self._frozen(trial).params.keys() < self.contender.space.keys():
            self._study.sampler = make_sampler(self._plan.section.sampler, self._plan.section.seed, number)
            for dimension in self.contender.space.values():
                suggest(trial, dimension)
        return trial


def judge(trial: Trial, round_number: int, value: float, last: int) -> bool:
    """Report what selects after a round; returns whether the pruner ends the trial, before its last one."""
    trial.report(value, round_number)
    if round_number >= last or not trial.should_prune():
        return False
    trial.set_user_attr(PRUNED_AT, round_number)
    return True


def present(trial: Trial, label: str, run: Path, artifacts: Path, outcome: str) -> None:
    """Show in Optuna's dashboard what a trial came to; before it is told."""
    cost = Cost.of(run)
    text = (
        f"**{label}, trial {trial.number}** {outcome}\n\n"
        f"- {cost.rounds} rounds, {cost.client_rounds:,.0f} client-rounds, "
        f"{cost.uplink_bytes / 1e6:,.2f} MB sent by clients, {cost.seconds:,.0f} s"
    )
    dashboard.keep(trial, run, artifacts, text)


def suggest(trial: Trial, dimension: Dimension) -> Any:
    """One value of a trial."""
    space = dimension.distribution
    if isinstance(space, CategoricalDistribution):
        return trial.suggest_categorical(dimension.key, space.choices)
    if isinstance(space, IntDistribution):
        return trial.suggest_int(dimension.key, space.low, space.high, log=space.log)
    assert isinstance(space, FloatDistribution)
    return trial.suggest_float(dimension.key, space.low, space.high, log=space.log)
