"""Per-client evaluation: how well the global model serves each client, before and after local training.

A client is judged on the mix of classes that it holds: what selects, of classification the accuracy, within
every class of the test set, weighted by the client's class shares. That is what is to be expected on test
samples drawn with the client's own class distribution, without the noise of drawing them. It takes no sample
from the client's training data, and the one pass over the test set that the central evaluation takes serves
all clients. What clients differ in beside their classes, such as a speaker's voice, it does not see. After
local training each client has a model, and needs a test pass, of its own: that is done on demand, for some
of the clients. With ``rows: own`` a client is judged by rows that were held out of its own instead.

Clients that never train (``unseen``) are judged by their own rows: on the global model, and on what they make
of it in a few steps on some rows of each class. All numbers of shots are judged by the same rows.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from cluster import seeding
from cluster.exchange import EvaluationChunk
from cluster.federation import Federation
from cluster.measures import Measure
from cluster.records.checkpoint import write_atomically
from cluster.records.run_folder import RunFolder
from cluster.rounds.metrics import Part
from cluster.simulation.devices import Devices
from cluster.simulation.shift import period_of
from cluster.workload.objectives import Sums


class ClientEvaluation:
    """Judges the clients of one experiment.

    Args:
        federation: Data, partition and configuration.
    """

    def __init__(self, federation: Federation) -> None:
        self._federation, self._section = federation, federation.config.evaluate_clients
        self._objective = federation.objective
        # Where the test split is not to be read, nobody can be judged on it.
        tested = any(chunk.split == "test" for chunk in federation.evaluation_chunks(2**30))
        self._every = self._section.every if tested or self._section.rows == "own" else 0

    def due(self, round_number: int, *, last: bool = False) -> bool:
        """Whether clients are judged after this round: every so many, and after the last."""
        return self._every > 0 and (last or round_number % self._every == 0)

    def chunks(self, round_number: int, *, last: bool) -> list[EvaluationChunk]:
        """What is to be evaluated beside the central chunks: a test pass a locally trained client."""
        if not self.due(round_number, last=last):
            return []
        section, own = self._section, self._federation.own
        if section.rows == "own":
            found = [self._own_chunk(c, None) for c in self._judged]
            found += [self._own_chunk(c, 0) for c in self._trained]
        else:
            rows = len(self._federation.dataset.test.targets)
            found = [EvaluationChunk("test", 0, rows, client=int(c), after=0) for c in self._trained]
        found += [EvaluationChunk("group", 0, size, client=g) for g, size in self._groups.items()]
        found += [self._own_chunk(c, shots) for shots in (None, *section.shots) for c in self._unseen]
        return [chunk for chunk in found if chunk.stop or own is None]

    def metrics(
        self, folder: RunFolder, round_number: int, parts: Mapping[Part, Sums], *, last: bool
    ) -> dict[str, Any]:
        """Judge the clients, where that is due, and keep ``clients.csv`` in the run's folder.

        Args:
            folder: The run's folder.
            round_number: The round whose result was evaluated.
            parts: The sums of the central chunks and of ``chunks``.
            last: Whether it is the run's last round.

        Returns:
            Over the clients: mean and standard deviation of what selects, and mean of the worst tenth; the
            same after local training, and what it gained.
        """
        if not parts or not self.due(round_number, last=last):
            return {}
        if self._section.rows == "own":
            before, after = (self._own(parts, self._judged, made) for made in (None, 0))
        else:
            before, after = self._by_classes(parts, round_number)
        self._write(folder, round_number, before, after)
        selects = self._objective.selects
        metrics = _spread(before, selects, "")
        both = np.isfinite(after) & np.isfinite(before)
        if both.any():
            gain = float(np.mean((after - before)[both]))
            metrics |= _spread(after, selects, "_after") | {f"clients/{selects.key}_gain": gain}
        for shots in (None, *self._section.shots) if self._section.unseen else ():
            suffix = "" if shots is None else f"_{shots}_shot"
            metrics |= _spread(self._own(parts, self._unseen, shots), selects, suffix, "unseen")
        return metrics | self._of_groups(parts)

    # ------------------------------------------------------------------------------------------- inside

    def _by_classes(self, parts: Mapping[Part, Sums], round_number: int) -> tuple[np.ndarray, np.ndarray]:
        """What selects of each judged client, before and after its local training, float64[judged]."""
        shares = self._shares(period_of(self._federation.config.shift, round_number))
        before = self._before(parts, shares)
        after = np.full(len(before), np.nan)
        places = np.searchsorted(self._judged, self._trained)
        for place, client in zip(places, self._trained, strict=True):
            sums = parts.get(("test", None, int(client), 0))
            if sums is not None:  # of one that failed and was skipped there are none
                after[place] = self._weighted(shares[place : place + 1], sums)[0]
        return before, after

    def _own_chunk(self, client: int, after: int | None) -> EvaluationChunk:
        """All rows that a client is judged by; the global model is cut to its tier's budget."""
        own = self._federation.own
        assert own is not None
        return EvaluationChunk(
            "own", 0, len(own.client(int(client))), self._tier(client, after), int(client), after
        )

    def _tier(self, client: int, after: int | None) -> str | None:
        tiers = list(self._federation.config.devices.tiers.items())
        if not tiers or after is not None:
            return None
        name, tier = tiers[Devices(self._federation.config).tiers[client]]
        return None if tier.sparsity is None else name

    def _own(self, parts: Mapping[Part, Sums], clients: np.ndarray, after: int | None) -> np.ndarray:
        """What selects, of each client on its own rows, float64[clients]; nan where that is not known."""
        found = [parts.get(("own", self._tier(c, after), int(c), after)) for c in clients]
        key = self._objective.selects.key
        return np.array([np.nan if sums is None else self._objective.metrics(sums)[key] for sums in found])

    @cached_property
    def _groups(self) -> Mapping[int, int]:
        """Validation rows of each group that has any, where groups are looked at."""
        groups = self._federation.dataset.train.groups
        if not self._section.groups or groups is None:
            return {}
        codes, sizes = np.unique(groups[self._federation.validation], return_counts=True)
        return dict(zip(codes.tolist(), sizes.tolist(), strict=True))

    def _of_groups(self, parts: Mapping[Part, Sums]) -> dict[str, float]:
        """Mean over the groups, and the worst one, of what selects."""
        selects = self._objective.selects
        values = [self._objective.metrics(parts["group", None, g, None])[selects.key] for g in self._groups]
        if not values:
            return {}
        worst = max(values) if selects.better == "lower" else min(values)
        return {f"groups/{selects.key}_mean": float(np.mean(values)), f"groups/{selects.key}_worst": worst}

    @property
    def _unseen(self) -> np.ndarray:
        """The clients that never train, int64."""
        config = self._federation.config
        return np.arange(config.population, config.partition.clients)

    @cached_property
    def _judged(self) -> np.ndarray:
        """The clients that are judged, the same ones every time; int64, sorted."""
        return self._some(np.arange(self._federation.config.population), self._section.clients)

    @cached_property
    def _trained(self) -> np.ndarray:
        """Those of them that are judged after local training too."""
        return self._some(self._judged, self._section.after)

    def _some(self, clients: np.ndarray, count: int | None) -> np.ndarray:
        if count is None or count >= len(clients):
            return clients
        rng = seeding.generator(self._federation.config.seed, "evaluation")
        return np.sort(rng.choice(clients, size=count, replace=False))

    @cached_property
    def _counts(self) -> np.ndarray:
        """Test samples of every class, int64[classes]."""
        dataset = self._federation.dataset
        return np.bincount(dataset.test.targets, minlength=len(dataset.classes))

    def _shares(self, period: int) -> np.ndarray:
        """Each judged client's class shares, float64[judged, classes], without the classes not in test.

        Args:
            period: Shifts of the data before the round.
        """
        federation = self._federation
        dataset, partition = federation.dataset, (federation.partition, *federation.shifted)[period]
        labels, classes = dataset.train.targets, len(dataset.classes)
        held = [np.bincount(labels[partition.client(int(c))], minlength=classes) for c in self._judged]
        testable = np.array(held, np.float64) * (self._counts > 0)
        with np.errstate(invalid="ignore"):  # a client of untested classes alone: no number
            return testable / testable.sum(axis=1, keepdims=True)

    def _weighted(self, shares: np.ndarray, sums: Sums) -> np.ndarray:
        own: np.ndarray = self._objective.metric_by_class(sums)[: shares.shape[1]]
        return (shares * own).sum(axis=1)

    def _before(self, parts: Mapping[Part, Sums], shares: np.ndarray) -> np.ndarray:
        """What selects, of the global model on each client: cut to its tier's budget, if it has one."""
        values = self._weighted(shares, parts["test", None, None, None])
        tiers = list(self._federation.config.devices.tiers)
        own = Devices(self._federation.config).tiers[self._judged] if tiers else None
        for index, tier in enumerate(tiers):
            sums = parts.get(("test", tier, None, None))
            if sums is not None and own is not None:
                values[own == index] = self._weighted(shares[own == index], sums)
        return values

    def _write(self, folder: RunFolder, round_number: int, before: np.ndarray, after: np.ndarray) -> None:
        text, key = io.StringIO(), self._objective.selects.key
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["client", "samples", key, f"{key}_after", "round"])
        sizes = self._federation.sizes_in(period_of(self._federation.config.shift, round_number))
        for client, one, other in zip(self._judged, before, after, strict=True):
            cells = ["" if np.isnan(value) else repr(float(value)) for value in (one, other)]
            writer.writerow([int(client), int(sizes[client]), *cells, round_number])
        write_atomically(folder.path / "clients.csv", text.getvalue().encode())


def _spread(values: np.ndarray, selects: Measure, suffix: str, whose: str = "clients") -> dict[str, float]:
    """Mean, standard deviation (of all clients, not of a sample) and mean of the worst tenth, rounded up."""
    known = np.sort(values[np.isfinite(values)])
    if not len(known):
        return {}
    tenth = -(-len(known) // 10)
    worst = known[-tenth:] if selects.better == "lower" else known[:tenth]
    return {
        f"{whose}/{selects.key}_mean{suffix}": float(known.mean()),
        f"{whose}/{selects.key}_std{suffix}": float(known.std()),
        f"{whose}/{selects.key}_worst_decile{suffix}": float(worst.mean()),
    }
