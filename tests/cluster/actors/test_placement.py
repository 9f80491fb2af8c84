"""Which actors a cluster holds, and what clients are expected to cost."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cluster
from cluster.actors.placement import (
    CALL_S,
    SHORT_CALL_S,
    ActorKind,
    Bundle,
    CostModel,
    Node,
    bundles,
    call_seconds,
    kinds_of,
    longest_first,
)
from cluster.exchange import Assignment, ClientReport, EvaluationChunk
from cluster.simulation.clock import Device

TWO_NODES = [Node(8, 2, {"class": "big"}), Node(8, 2, {"class": "small"})]


def sizes(found):
    return [(bundle.actors, bundle.resources) for bundle in found]


def test_shares_of_a_gpu_fill_every_gpu_and_never_span_two():
    # 0.4: two on a GPU, 0.2 left over; four GPUs, each reserved whole.
    found = bundles([ActorKind("", 1, 0.4)], TWO_NODES, None, 100)
    assert sizes(found) == [(2, {"CPU": 2, "GPU": 1.0})] * 4
    # 0.6 each: as numbers three would fit on a node's two GPUs, really it is one a GPU.
    found = bundles([ActorKind("", 1, 0.6)], TWO_NODES, None, 100)
    assert sizes(found) == [(1, {"CPU": 1, "GPU": 1.0})] * 4


def test_as_many_as_fit_begin_with_one_on_each_gpu():
    # A cohort of 4 on four GPUs of half shares: one each, not two on two of them.
    assert sizes(bundles([ActorKind("", 1, 0.5)], TWO_NODES, None, 4)) == [(1, {"CPU": 1, "GPU": 1.0})] * 4


def test_a_number_that_was_asked_for_leaves_the_rest_free():
    # Three halves: one GPU whole, and half of the next.
    found = bundles([ActorKind("", 1, 0.5)], TWO_NODES, 3, 100)
    assert sizes(found) == [(2, {"CPU": 2, "GPU": 1.0}), (1, {"CPU": 1, "GPU": 0.5})]


def test_cores_and_whole_gpus_bound_the_actors():
    assert sizes(bundles([ActorKind("", 3)], TWO_NODES, None, 100)) == [(1, {"CPU": 3})] * 4  # 2 on 8 cores
    assert sizes(bundles([ActorKind("", 1, 2)], TWO_NODES, None, 100)) == [(1, {"CPU": 1, "GPU": 2})] * 2
    assert sizes(bundles([ActorKind("", 5, 0.25)], TWO_NODES, None, 100)) == [(1, {"CPU": 5, "GPU": 1.0})] * 2


def test_kinds_get_actors_by_their_clients_on_nodes_of_their_label():
    big = ActorKind("big", 2, label={"class": "big"}, share=0.75)
    small = ActorKind("small", 1, label={"class": "small"}, share=0.25)
    found = bundles([big, small], TWO_NODES, None, 4)
    assert [(bundle.kind.name, bundle.actors) for bundle in found] == [("big", 1)] * 3 + [("small", 1)]


def test_what_has_no_room_is_still_asked_for():
    nowhere = ActorKind("", 1, label={"class": "huge"})
    assert bundles([nowhere], TWO_NODES, None, 100) == [Bundle(nowhere, 1)]
    assert sizes(bundles([ActorKind("", 8)], TWO_NODES, 3, 100)) == [(1, {"CPU": 8})] * 3


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=3),
    st.lists(
        st.tuples(st.sampled_from([0.5, 1, 2]), st.sampled_from([0, 0.3, 0.5, 1, 2])), min_size=1, max_size=3
    ),
)
def test_no_node_is_promised_more_than_it_has(nodes, asked):
    found = bundles(
        [ActorKind(str(i), cpus, gpus) for i, (cpus, gpus) in enumerate(asked)],
        [Node(cpus, gpus) for cpus, gpus in nodes],
        None,
        100,
    )
    placed = [bundle for bundle in found if bundle.whole]
    assert sum(bundle.resources["CPU"] for bundle in placed) <= sum(cpus for cpus, _ in nodes)
    assert sum(bundle.resources.get("GPU", 0) for bundle in placed) <= sum(gpus for _, gpus in nodes)
    for bundle in found:
        assert bundle.kind.gpus * bundle.actors <= max(1, bundle.kind.gpus)
    assert {bundle.kind.name for bundle in found} == {str(i) for i in range(len(asked))}


def tiers(*more):
    return cluster.resolve(
        None,
        [
            "algorithm.sparsity=0.5",
            "devices.tiers={low: {share: 0.75, sparsity: 0.9}, high: {share: 0.25, sparsity: 0.5}}",
            *more,
        ],
    )


def test_a_tier_that_asks_for_resources_has_its_own_kind():
    common = ActorKind("", 1.0)
    assert kinds_of(tiers()) == [common]
    own = ActorKind("low", 0.5, 0.0, {}, 0.75)
    assert kinds_of(tiers("devices.tiers.low.cpus=0.5")) == [own, ActorKind("", 1.0, share=0.25)]
    both = kinds_of(tiers("devices.tiers.low.cpus=0.5", "devices.tiers.high.label.class=big"))
    assert both == [own, ActorKind("high", 1.0, 0.0, {"class": "big"}, 0.25)]


def test_a_tiers_cores_and_label_do_not_change_results_but_its_gpus_do():
    plain = tiers().digest()
    assert tiers("devices.tiers.low.cpus=2", "devices.tiers.low.label.class=big").digest() == plain
    assert tiers("devices.tiers.low.gpus=1").digest() != plain


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("gpus_per_actor=1.5", r"gpus_per_actor: found 1\.5; allowed is a share of one GPU"),
        ("devices.tiers.low.gpus=2.5", r"devices\.tiers\.low\.gpus: found 2\.5; allowed"),
        ("label.class=in(a,b)", r"label\.class: .*found 'in\(a,b\)'"),
        ("detached=true", r"detached: needs a cluster that outlives this process, found address: local"),
        ("on_client_error=ignore", r"on_client_error: .*'stop' or 'skip'.* found 'ignore'"),
    ],
)
def test_what_cannot_be_placed_is_refused_by_name(override, complaint):
    with pytest.raises(cluster.ConfigError, match=complaint):
        tiers(override)


# ----------------------------------------------------------------------------------------------- clients


def report(client, samples, seconds):
    from dataclasses import replace

    return replace(ClientReport.failed(client, samples, 1, ""), seconds=seconds)


def test_the_first_visit_sets_the_pace_and_an_exact_forecast_changes_nothing():
    costs = CostModel()
    assert costs.pace(0) is None
    assert costs.work(7, 20) == 20
    costs.learn(0, [report(7, 20, 4.0)])
    assert costs.pace(0) == pytest.approx(0.2)  # 4 s / 20 samples
    costs.learn(0, [report(8, 10, 2.0)])
    assert (costs.pace(0), costs.work(8, 10)) == (pytest.approx(0.2), pytest.approx(10))


def test_an_error_is_shared_between_client_and_actor():
    costs = CostModel()
    costs.learn(0, [report(7, 20, 4.0)])
    costs.learn(1, [report(8, 10, 32.0)])  # 2 s expected: 16 times longer
    assert costs.pace(1) == pytest.approx(0.2 * 2)  # 16 ** 0.25
    assert costs.work(8, 10) == pytest.approx(10 * 4)  # 16 ** 0.5
    assert costs.pace(0) == pytest.approx(0.2)
    assert costs.pace(2) == pytest.approx((0.2 + 0.4) / 2)  # one that has not played is like the others


def test_a_wait_for_a_core_makes_no_client_costly():
    costs = CostModel()
    costs.learn(0, [report(7, 20, 0.005)])
    costs.learn(0, [report(8, 20, 0.050)])  # its actor, just begun, took ten times as long
    assert costs.work(8, 20) == pytest.approx(20 * 10**0.5)
    for _ in range(20):
        costs.learn(0, [report(8, 20, 0.010), report(7, 20, 0.005)])
        assert costs.work(8, 20) == costs.work(7, 20) == 20


@pytest.mark.parametrize("seconds", [(0.012, 0.028), (0.004, 0.2)])
def test_short_visits_beside_longer_ones_disturb_no_pace(seconds):
    costs, rng = CostModel(), np.random.default_rng(0)
    ratios = []
    for turn in range(200):
        for actor in (0, 1):
            clients = rng.permutation(20)[:6]
            costs.learn(
                actor, [report(int(c), 10, seconds[c % 2] * float(rng.normal(1.0, 0.1))) for c in clients]
            )
        if turn > 50:
            ratios.append(costs.pace(0) / costs.pace(1))
    low, high = np.quantile(ratios, [0.05, 0.95])
    assert 0.8 < low <= high < 1.25
    assert costs.work(1, 10) / costs.work(0, 10) > 0.8 * seconds[1] / seconds[0]


def test_slow_actors_and_costly_clients_are_told_apart():
    costs, rng = CostModel(), np.random.default_rng(0)
    for _ in range(400):
        client, actor = int(rng.integers(10)), int(rng.integers(2))
        # Actor 1 is three times slower; client 0 costs five times what its samples say.
        costs.learn(actor, [report(client, 10, (1 + 2 * actor) * (5 if client == 0 else 1))])
    assert costs.pace(1) / costs.pace(0) == pytest.approx(3, rel=0.1)
    assert costs.work(0, 10) / costs.work(1, 10) == pytest.approx(5, rel=0.1)


def test_the_longest_expected_client_comes_first_and_ties_go_by_index():
    costs = CostModel()
    costs.learn(0, [report(0, 10, 1.0), report(1, 10, 16.0)])
    tasks = [Assignment(client, 0.5, Device(1.0, 1.0, 1.0, 0.0), 0) for client in range(4)]
    # Client 1 costs four times its ten samples.
    order = longest_first(tasks, np.array([10, 10, 30, 10]), costs)
    assert [task.client for task in order] == [1, 2, 0, 3]


def test_calls_are_guided_not_shorter_than_worth_it_and_bounded_in_time():
    assert call_seconds(30.0) == pytest.approx(10)
    assert call_seconds(0.24) == SHORT_CALL_S  # a third would be less
    assert call_seconds(0.05) == pytest.approx(0.05)  # no more than its share
    assert call_seconds(1000.0) == CALL_S


def test_a_chunk_of_the_evaluation_costs_what_such_chunks_have_cost():
    costs, central = CostModel(), EvaluationChunk("test", 0, 5)
    own = EvaluationChunk("test", 0, 5, client=1, after=0)
    assert costs.chunk_seconds(central) == 0
    costs.learn_chunks([replace(central, seconds=1.0), replace(central, seconds=2.0)])
    assert costs.chunk_seconds(central) == pytest.approx(1.5)
    assert costs.chunk_seconds(own) == 0  # it trains a client, which is another matter
