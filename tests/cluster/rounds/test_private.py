"""Private runs: what the noise is, what is composed, where a budget ends them, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from algorithms.core.parameters import Entry
from cluster.accounting import AccountingError, Event
from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.guarantee import check_guarantee, noise_of, planned_events, spent
from cluster.measures import MEASURES
from cluster.records.checkpoint import latest, read_meta
from cluster.records.run_folder import RunFolder
from tests.cluster.records.interrupted_runs import assert_same_run, drive, federated
from tests.tiny_experiment import run_inline, tiny_federation

pytest.importorskip("dp_accounting", reason="epsilon is composed by dp-accounting, the extra dp")

FIXED = {"name": "fixed_mask", "sparsity": 0.9}


def private(cache, clip=0.5, noise=1.0, **overrides):
    """A tiny experiment of three rounds with cohorts by coins; ``dp`` holds further keys of privacy.dp."""
    dp = {"clip": clip, "noise_multiplier": noise, **overrides.pop("dp", {})}
    tree = {"sampler": {"name": "poisson"}, "rounds": 3, "privacy": {"dp": dp}, **overrides}
    return tiny_federation(cache, **tree)


def weights(run):
    return run.state.weights.numpy().astype(np.float64)


# ------------------------------------------------------------------------------------------------- noise


def noise_of_a_round(tmp_path, name, number=1, **overrides):
    """What one round's noise adds to the model, by a run with next to none."""
    runs = []
    for noise in (2.0, 1e-6):
        config = private(tmp_path, noise=noise, rounds=number, **overrides)
        runs.append(run_inline(config, tmp_path / f"{name}-{noise}"))
    return weights(runs[0]) - weights(runs[1]), runs[0]


def test_the_noise_has_the_scale_that_it_says_and_is_the_same_for_every_method(tmp_path):
    large = {"model": {"name": "small_cnn", "channels": [8, 16], "hidden": 64, "norm": "group", "groups": 2}}
    dense, _ = noise_of_a_round(tmp_path, "dense", **large)
    masked, held = noise_of_a_round(tmp_path, "masked", algorithm=FIXED, **large)
    scale, size = 2.0 * 0.5 / 4, len(dense)  # z C / cohort, whoever came
    assert size > 5_000
    # Of n normal numbers: mean within 4 / sqrt(n) deviations, variance within 4 sqrt(2 / n), kurtosis 3.
    assert abs(dense.mean()) < 4 * scale / np.sqrt(size)
    assert np.var(dense) == pytest.approx(scale**2, rel=4 * np.sqrt(2 / size))
    assert (dense**4).mean() / scale**4 == pytest.approx(3.0, rel=4 * np.sqrt(32 / 3 / size))
    # Where both have some it is the same noise; outside the mask there is none.
    mask = held.state.mask.numpy()
    inside = np.concatenate([mask, np.ones(size - len(mask), bool)])
    np.testing.assert_allclose(masked[inside], dense[inside], atol=1e-5)
    assert not masked[~inside].any()
    assert np.square(masked).sum() / np.square(dense).sum() == pytest.approx(inside.mean(), rel=0.15)
    # Another seed, another round, other noise.
    other, _ = noise_of_a_round(tmp_path, "other", seed=4, **large)
    assert abs(np.corrcoef(dense, other)[0, 1]) < 0.06


@pytest.mark.parametrize("algorithm", [{"name": "fedavg"}, FIXED, {"name": "topk", "sparsity": 0.5}])
def test_without_noise_and_clip_it_is_the_equal_mean_of_all(algorithm, tmp_path):
    """A coin of chance 1 asks everybody, so that the denominator is who came."""
    config = private(tmp_path, clip=1e4, noise=1e-12, cohort=6, rounds=1, algorithm=algorithm)
    plain = tiny_federation(
        tmp_path, cohort=6, rounds=1, algorithm=algorithm, aggregation={"weighting": "equal"}
    )
    found, expected = (run_inline(each, tmp_path / name) for name, each in (("dp", config), ("eq", plain)))
    np.testing.assert_allclose(weights(found), weights(expected), atol=2e-7)
    assert found.lines[0]["privacy/clipped"] == 0.0


def test_a_round_by_a_reference_that_knows_the_updates(tmp_path):
    run = run_inline(private(tmp_path, clip=0.1, noise=1e-6, cohort=3), tmp_path / "run")
    before, layout = run.states[0].weights.numpy().astype(np.float64), run.driver.layout
    total, cut = np.zeros(len(before)), 0
    sent = [values for (number, _), (values, _) in run.uploads.items() if number == 1]
    for values in sent:
        vector = torch.cat([values[entry.name].reshape(-1) for entry in layout.trained]).numpy()
        delta = vector.astype(np.float64) - before
        length = np.sqrt((delta * delta).sum())
        cut += length > 0.1
        total += delta * min(1.0, 0.1 / length)
    assert run.lines[0]["privacy/clipped"] == cut / len(sent)
    own = {key for key in run.lines[0] if key.startswith("privacy/")}
    assert own == {measure.key for measure in MEASURES if measure.when == "privacy.dp"}
    np.testing.assert_allclose(run.states[1].weights.numpy(), before + total / 3, atol=1e-6)


# -------------------------------------------------------------------------------------------- composition


def test_epsilon_stands_in_every_line_and_counts_whom_it_asked(tmp_path):
    """Cohorts that turn out empty, devices that are away or drop out: the coins were thrown all the same."""
    tiers = {"only": {"share": 1.0, "dropout": 0.7}}
    rare = run_inline(private(tmp_path, cohort=1, rounds=8, devices={"tiers": tiers}), tmp_path / "rare")
    there = run_inline(private(tmp_path, cohort=1, rounds=8), tmp_path / "there")
    told = [line["privacy/epsilon"] for line in rare.lines]
    assert told == [line["privacy/epsilon"] for line in there.lines]
    assert told == sorted(set(told))
    assert told[-1] == pytest.approx(spent(rare.driver.config, planned_events(rare.driver.config, 1.0)))
    empty = [line["round"] for line in there.lines if not line["clients/trained"]]
    assert empty
    assert len(empty) < len([line for line in rare.lines if not line["clients/trained"]])
    for number in range(1, 9):
        same = torch.equal(there.states[number].weights, there.states[number - 1].weights)
        assert same == (number in empty)
        assert (there.lines[number - 1]["privacy/clipped"] is None) == (number in empty)


def test_a_stage_before_round_1_is_a_release_of_its_own(tmp_path):
    config = private(tmp_path, algorithm={"name": "ssfl", "sparsity": 0.5}, rounds=2)
    run = run_inline(config, tmp_path / "run")
    assert [(event.rate, event.count) for event in planned_events(config, 1.0)] == [(1.0, 1), (4 / 6, 2)]
    assert run.lines[0]["round"] == 0
    assert run.lines[-1]["privacy/epsilon"] == spent(config, planned_events(config, 1.0))
    assert run.lines[-1]["sparsity/global"] == pytest.approx(0.5, abs=0.01)


def test_a_mask_found_in_private_is_full_and_as_dense_in_every_layer(tmp_path):
    """FLASH ranks a noised mean and counts nobody's weights; from round 2 on noise stays inside its mask."""
    run = run_inline(private(tmp_path, algorithm={"name": "flash", "sparsity": 0.75}), tmp_path / "run")
    mask, layers = run.state.mask.numpy(), run.driver.layout.prunable
    assert np.count_nonzero(mask) == round(0.25 * len(mask))
    for layer in layers:
        assert abs(np.count_nonzero(mask[layer.span]) - 0.25 * layer.size) <= 1
    assert not run.state.weights.numpy()[: len(mask)][~mask].any()
    assert np.count_nonzero(run.states[2].weights.numpy()[: len(mask)]) == np.count_nonzero(mask)


def test_an_interrupted_run_is_the_same_and_keeps_events_and_not_an_accountant(tmp_path):
    dp = {"clip": 0.3, "noise_multiplier": 0.3, "adaptive": True}
    config = federated(tmp_path, sampler={"name": "poisson"}, algorithm=FIXED, privacy={"dp": dp})
    federation = Federation.of(config)
    whole, cut = (RunFolder.create(tmp_path / name, config) for name in ("whole", "cut"))
    drive(whole, federation)
    drive(cut, federation, killed_at=3)
    stored = read_meta(latest(cut.checkpoints))["driver"]["privacy"]
    assert stored["events"] == [[0.3, 4 / 6, 2]]
    drive(cut, federation)
    assert_same_run(cut.path, whole.path)
    clips = [line["privacy/clip"] for line in whole.rounds()]
    assert clips[0] == 0.3
    assert len(set(clips)) == len(clips)  # it moves every round


# ------------------------------------------------------------------------------------------------ budgets


def test_a_run_ends_before_the_round_that_exceeds_its_budget(tmp_path):
    config = private(tmp_path, rounds=10, dp={"epsilon": 9.0})
    run = run_inline(config, tmp_path / "run")
    done = len(run.lines)
    assert 1 < done < 10
    assert run.lines[-1]["privacy/epsilon"] <= 9.0
    after = spent(config, [Event(1.0, 4 / 6, done + 1)])
    assert run.driver.stopped_by == f"privacy/epsilon would be {after:.4g} > 9 after round {done + 1}"
    assert run.lines[-1]["test/accuracy"] is not None  # the last round is evaluated, as any last one


def test_of_a_budget_alone_the_noise_is_worked_out(tmp_path):
    config = private(tmp_path, noise=None, dp={"epsilon": 6.0}, rounds=3)
    run = run_inline(config, tmp_path / "run")
    assert len(run.lines) == 3
    assert 5.99 < run.lines[-1]["privacy/epsilon"] <= 6.0
    assert run.driver.stopped_by is None
    assert noise_of(config) == round(noise_of(config), 4)


# ----------------------------------------------------------------------------------------------- refusals

ON = ["sampler.name=poisson", "privacy.dp.clip=1", "privacy.dp.noise_multiplier=1", "algorithm.name=fedavg"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stop.metric=privacy/epsilon", "stop.target=8"], "is not measured; set privacy.dp.clip"),
        (["privacy.dp.epsilon=8"], "privacy.dp.epsilon: 8.0, but privacy.dp.clip is unset"),
        ([*ON, "privacy.dp.noise_multiplier=null"], "without noise; set privacy.dp.noise_multiplier"),
        ([*ON, "sampler.name=uniform"], "sampler.name: uniform, and privacy.dp needs a coin"),
        ([*ON, "schedule.over_selection=1.3"], "schedule.over_selection: 1.3, and"),
        ([*ON, "schedule.name=buffered"], "schedule.name: buffered, and privacy.dp needs whole rounds"),
        ([*ON, "privacy.dp.delta=0.9"], "privacy.dp.delta: 0.9 allows to publish one of "),
        ([*ON, "max_update_norm=3"], "max_update_norm: 3, and who is refused tells of its data"),
        ([*ON, "wire.grid=64"], "wire.grid: 64, and privacy.dp needs values to clip"),
        ([*ON, "aggregation.name=median"], "aggregation.name: median, and privacy.dp needs the sum"),
        ([*ON, "aggregation.weighting=samples"], "aggregation.weighting: samples, and privacy.dp"),
        ([*ON, "byzantine.share=0.2", "byzantine.kind=little_is_enough"], "looks at what others send"),
        ([*ON, "algorithm.name=feddst"], "algorithm.name: feddst advances by more than the mean"),
        ([*ON, "algorithm.name=flash", "algorithm.stage1=sensitivity"], "algorithm.name: flash advances"),
        ([*ON, "algorithm.name=ssfl", "algorithm.saliency_weighting=equal"], "saliency_weighting: equal"),
        ([*ON, "algorithm.name=heterofl"], "it works with fedalign, fedavg, fedef"),
    ],
)  # fmt: skip
def test_what_it_does_not_fit_is_refused_by_name(overrides, says):
    with pytest.raises(ConfigError) as raised:
        resolve("quickstart", overrides)
    assert says in str(raised.value)


def test_what_would_travel_unprotected_is_refused_before_anything_starts(tmp_path):
    norm = {"name": "tests.tiny_experiment:tiny_model"}
    with pytest.raises(AccountingError, match=r"running_mean of model\.name=.* averages clients' data"):
        Federation.of(private(tmp_path, model=norm))
    config = private(tmp_path)
    layout = Federation.of(config).layout
    size = layout.size
    beside = replace(layout, up=(Entry("scores", (3,), size, size + 3),))
    with pytest.raises(AccountingError, match=r"scores, which fedavg sends beside the model"):
        check_guarantee(config, beside)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"dp": {"epsilon": 2.0}}, r"privacy\.dp\.epsilon: 2, and with privacy\.dp\.noise_multiplier 1 one"),
        ({"dp": {"adaptive": True}}, r"privacy\.dp\.adaptive: with a noise multiplier of 1 and cohort: 4"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_starts(overrides, says, tmp_path):
    with pytest.raises(AccountingError, match=says):
        Federation.of(private(tmp_path, **overrides))
