"""Distribution shift: who trains on what before and after, its metrics by hand, resume across it."""

import numpy as np
import pytest

from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from cluster.simulation.shift import first_round_of, partition_of, period_of, rows_of, shift_metrics
from cluster.workload.objectives import Classification
from cluster.workload.partitioners import PartitionError
from tests.cluster.records.interrupted_runs import assert_same_run, drive
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

ACCURACY = Classification().selects


def shifted(cache, rounds=6, **shift):
    return tiny_federation(cache, rounds=rounds, checkpoint_every=2, shift=shift)


def test_periods():
    pairs = {"once": {"round": 3}, "again": {"round": 3, "every": 2}, "never": {}}
    sections = {name: shifted_section(**keys) for name, keys in pairs.items()}
    assert [period_of(sections["never"], t) for t in range(1, 8)] == [0] * 7
    assert [period_of(sections["once"], t) for t in range(1, 8)] == [0, 0, 1, 1, 1, 1, 1]
    assert [period_of(sections["again"], t) for t in range(1, 8)] == [0, 0, 1, 1, 2, 2, 3]
    assert [first_round_of(sections["again"], p) for p in range(4)] == [1, 3, 5, 7]


def shifted_section(**keys):
    from cluster.configuration.device_sections import ShiftSection

    return ShiftSection(**keys)


def test_each_shift_draws_anew_and_keeps_what_it_does_not_name(cache):
    config = shifted(cache, round=3, every=2, partition={"alpha": 0.1})
    sections = [partition_of(config, period) for period in range(3)]
    assert [(s.name, s.clients, s.alpha, s.seed) for s in sections] == [
        ("dirichlet", 6, 1.0, 5),
        ("dirichlet", 6, 0.1, 6),
        ("dirichlet", 6, 0.1, 7),
    ]
    named = shifted(cache, round=3, partition={"name": "iid", "seed": 40})
    assert (partition_of(named, 1).name, partition_of(named, 1).seed) == ("iid", 40)


def test_clients_train_on_the_partition_of_the_round(cache, tmp_path):
    config = shifted(cache, round=3, every=2, partition={"name": "iid"})
    federation = Federation.of(config)
    assert len(federation.shifted) == 2
    engine, seen = InlineEngine(federation.setup()), {}
    visit = engine._host._trainer.visit

    def recording(client, rows, sparsity, broadcast, *kept, **more):
        seen[broadcast.instructions.round, client] = rows.tolist()
        return visit(client, rows, sparsity, broadcast, *kept, **more)

    engine._host._trainer.visit = recording
    Driver(RunFolder.create(tmp_path / "run", config), federation, engine).run()
    periods = [federation.partition, *federation.shifted]
    for (number, client), rows in seen.items():
        assert rows == periods[(0, 0, 0, 1, 1, 2, 2)[number]].client(client).tolist()
    assert {number for number, _ in seen} == {1, 2, 3, 4, 5, 6}
    # The reports' samples, and with them the weights in the mean, are those of the period.
    assert not np.array_equal(federation.sizes_in(0), federation.sizes_in(1))


def test_rotating_classes(cache):
    config = shifted(cache, round=3, every=2, classes=2)
    federation = Federation.of(config)
    labels = federation.dataset.train.targets
    found = [
        sorted(set(labels[part.indices].tolist())) for part in (federation.partition, *federation.shifted)
    ]
    assert found == [[0, 1], [0, 2], [1, 2]]  # of three classes: 0 1, then 2 0, then 1 2
    kept = np.arange(100, 120)
    assert set(labels[rows_of(config, 1, kept, labels)]) == {0, 2}
    assert rows_of(shifted(cache, round=3), 1, kept, labels) is kept


def test_metrics_by_hand(cache):
    config = shifted(cache, rounds=20, round=4, every=10)
    accuracy = {1: 0.2, 2: 0.5, 3: 0.6, 4: 0.3, 5: 0.5, 6: 0.61, 7: 0.4, 13: 0.7, 14: 0.2}
    stored = {number: {"round": number, "test/accuracy": value} for number, value in accuracy.items()}
    found = {number: shift_metrics(config, stored, stored[number], ACCURACY) for number in stored}
    assert found[3] == {"shift/period": 0}
    assert found[4] == {
        "shift/period": 1,
        "shift/accuracy_before": 0.6,
        "shift/accuracy_change": pytest.approx(-0.3),
        "shift/recovery_rounds": None,
    }
    assert found[5]["shift/accuracy_change"] == pytest.approx(-0.1)
    assert found[6]["shift/recovery_rounds"] == 3  # rounds 4, 5 and 6
    assert found[7]["shift/recovery_rounds"] == 3  # once recovered is recovered
    assert found[14]["shift/accuracy_before"] == 0.7
    assert found[14]["shift/accuracy_change"] == pytest.approx(-0.5)
    # Rounds computed again know later lines, and must not use them.
    assert shift_metrics(config, {5: stored[5]} | stored, stored[5], ACCURACY) == found[5]
    assert shift_metrics(config, stored, {"round": 8}, ACCURACY) == {"shift/period": 1}  # not evaluated


def test_resume_across_a_shift(cache, tmp_path):
    config = shifted(cache, rounds=5, round=3, every=1, partition={"alpha": 0.3})
    federation = Federation.of(config)
    drive(RunFolder.create(tmp_path / "reference", config), federation)
    for stop in (2, 3, 4):
        folder = RunFolder.create(tmp_path / f"killed-{stop}", config)
        drive(folder, federation, killed_at=stop)
        drive(RunFolder.open(folder.path), federation)
        assert_same_run(folder.path, tmp_path / "reference")
    last = RunFolder(tmp_path / "reference").rounds()[-1]
    assert last["shift/period"] == 3


def test_a_shift_that_cannot_be_drawn_fails_before_anything_starts(cache):
    with pytest.raises(PartitionError, match=r"natural.* needs groups"):
        Federation.of(shifted(cache, round=3, partition={"name": "natural"}))
