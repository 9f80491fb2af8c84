"""Every partition is disjoint, covers what it promises, and depends on its seed alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.configuration.choices import ChoiceError, fields, names
from cluster.workload import partitioners as module
from cluster.workload.partition import ListedPartition
from cluster.workload.partition_picture import picture
from cluster.workload.partitioners import PartitionError
from tests.cluster.workload.divided import partition

PARTITIONS = names("partition")

_SHARED = ("clients", "seed", "groups", "available")

#: The kinds that list every client's samples; `sampled` has a file of its own.
LISTED = tuple(name for name in PARTITIONS if name != "sampled")


@st.composite
def requests(draw):
    """Arguments that every kind accepts: labels, groups, clients, seed and the samples that may be used."""
    size = draw(st.integers(1, 150))
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    labels = generator.integers(0, draw(st.integers(1, 6)), size)
    kept = np.sort(generator.permutation(size)[: draw(st.integers(1, size))])
    clients = draw(st.integers(1, kept.size))
    groups = generator.integers(0, 9, size)
    groups[kept[:clients]] = np.arange(clients)  # at least as many groups as clients
    return labels, {
        "groups": groups,
        "available": draw(st.sampled_from([kept, None])) if clients <= kept.size else None,
        "clients": clients,
        "seed": draw(st.integers(0, 2**32)),
        "alpha": 10.0 ** draw(st.floats(-3, 3)),
        "shards_per_client": draw(st.integers(1, max(1, kept.size // clients))),
    }


@pytest.mark.parametrize("name", LISTED)
@settings(max_examples=60, deadline=None)
@given(request=requests())
def test_every_kind_keeps_its_promises(name, request):
    labels, options = request
    options = {k: v for k, v in options.items() if k in _SHARED or k in fields("partition", name)}
    parts = partition(name, labels, **options)
    clients, available = options["clients"], options["available"]
    pool = np.arange(labels.size) if available is None else available
    assert parts.clients == clients
    assert parts.indices.dtype == parts.offsets.dtype == np.int64
    assert parts.offsets[0] == 0
    assert parts.offsets[-1] == parts.indices.size
    assert np.unique(parts.indices).size == parts.indices.size  # disjoint
    assert np.isin(parts.indices, pool).all()
    assert parts.sizes.min() >= 1
    for client in range(clients):
        assert np.all(np.diff(parts.client(client)) > 0)
    # What each kind promises about sizes.
    if name == "lda":
        assert np.all(parts.sizes == pool.size // clients)
    else:
        assert parts.indices.size == pool.size
    if name == "iid":
        assert np.ptp(parts.sizes) <= 1
    if name == "shards":
        assert np.ptp(parts.sizes) <= options["shards_per_client"]  # each shard is even to one sample
    if name == "natural":
        for group in np.unique(options["groups"]):
            members = np.flatnonzero(options["groups"] == group)
            holders = [i for i in range(clients) if np.isin(parts.client(i), members).any()]
            assert len(holders) <= 1
    # The seed decides, and nothing else: not the global generator, not an earlier call.
    np.random.default_rng(1).random()
    assert partition(name, labels, **options).digest() == parts.digest()
    histogram = parts.class_histogram(labels, 6)
    assert histogram.shape == (clients, 6)
    np.testing.assert_array_equal(histogram.sum(axis=1), parts.sizes)
    np.testing.assert_array_equal(histogram.sum(axis=0), np.bincount(labels[parts.indices], minlength=6))


@pytest.mark.parametrize("name", PARTITIONS)
def test_seeds_differ(name):
    labels = np.arange(200) % 5
    options = {"clients": 10, "groups": np.arange(200) % 40}
    digests = {partition(name, labels, seed=seed, **options).digest() for seed in range(5)}
    assert len(digests) == 5


# --- lda


def balanced(samples=5000, classes=10):
    return np.arange(samples) % classes


def test_lda_at_alpha_1000_is_nearly_uniform():
    parts = partition("lda", balanced(), clients=20, seed=1, alpha=1000)
    deviations = np.abs(parts.class_histogram(balanced(), 10) / 250 - 0.1)
    # 250 draws of probability 0.1 have a standard deviation of 0.019; five of them.
    assert deviations[:15].max() < 0.1
    # The last client takes what all the others left: sqrt(19) times that deviation, 0.083; five of them.
    assert deviations.max() < 0.415


def test_lda_at_alpha_0_01_is_nearly_one_class_a_client():
    histogram = partition("lda", balanced(), clients=20, seed=1, alpha=0.01).class_histogram(balanced(), 10)
    assert np.median(histogram[:5].max(axis=1) / 250) > 0.95  # the later clients meet exhausted classes
    assert np.median(histogram.max(axis=1) / 250) > 0.8


@pytest.mark.parametrize("alpha", [1000, 1, 0.1, 0.001])
def test_lda_uses_every_sample_but_the_remainder(alpha):
    labels = balanced(1003)
    parts = partition("lda", labels, clients=25, seed=7, alpha=alpha)
    assert parts.sizes.tolist() == [40] * 25
    assert 1003 - parts.indices.size == 3  # 1003 mod 25


def test_lda_shares_follow_the_dirichlet_distribution():
    """Its first client sees full stocks: the expected squared share is that of Dirichlet(alpha 1_C).

    E[q^2] = (alpha + 1) / (C (C alpha + 1)); with alpha = 0.5 and C = 4: 1.5 / 12 = 0.125. m = 50 multinomial
    draws add E[q (1 - q)] / m = (0.25 - 0.125) / 50 = 0.0025.
    """
    labels = np.arange(2000) % 4
    seconds = []
    for seed in range(400):
        parts = partition("lda", labels, clients=40, seed=seed, alpha=0.5)
        shares = np.bincount(labels[parts.client(0)], minlength=4) / 50
        seconds.append(np.mean(shares**2))
    error = np.std(seconds) / np.sqrt(len(seconds))
    assert abs(np.mean(seconds) - 0.1275) < 4 * error


def one_by_one(labels, clients, alpha, generator):
    """Hsu et al.'s procedure as it is told: one draw after the other. Returns the class histogram."""
    classes = labels.max() + 1
    stock = np.bincount(labels)
    histogram = np.zeros((clients, classes), dtype=np.int64)
    for client in range(clients):
        probabilities = generator.dirichlet(np.full(classes, alpha))
        probabilities = np.where(stock > 0, probabilities + 1e-5, 0)
        probabilities /= probabilities.sum()
        for _ in range(labels.size // clients):
            drawn = generator.choice(classes, p=probabilities)
            stock[drawn] -= 1
            histogram[client, drawn] += 1
            if stock[drawn] == 0 and stock.any():
                probabilities = np.where(stock > 0, probabilities + 1e-5, 0)
                probabilities /= probabilities.sum()
    return histogram


def test_lda_in_batches_is_distributed_as_one_by_one():
    """Two clients share four small classes, so that each soon exhausts one: there the two could differ."""
    labels = np.repeat(np.arange(4), [9, 6, 6, 3])
    trials = 1500
    batched, plain = np.zeros((2, trials, 2, 4))
    for seed in range(trials):
        parts = partition("lda", labels, clients=2, seed=seed, alpha=0.3)
        batched[seed] = parts.class_histogram(labels, 4)
        plain[seed] = one_by_one(labels, 2, 0.3, np.random.default_rng(10_000 + seed))
    for moment in (1, 2):
        one, other = batched**moment, plain**moment
        error = np.sqrt((one.var(axis=0) + other.var(axis=0)) / trials)
        assert (np.abs(one.mean(axis=0) - other.mean(axis=0)) / error).max() < 4


def in_turns(labels, clients, alpha, generator):
    """The same with turns of all clients shuffled, as it is told: a class out of stock is drawn anew."""
    classes = labels.max() + 1
    stock = np.bincount(labels)
    histogram = np.zeros((clients, classes), dtype=np.int64)
    mixtures = generator.dirichlet(np.full(classes, alpha), size=clients)
    left = np.full(clients, labels.size // clients)
    while left.any():
        client = generator.choice(clients, p=left / left.sum())  # one of the turns that are left
        while stock[drawn := generator.choice(classes, p=mixtures[client])] == 0:
            if mixtures[client][stock > 0].sum() < 1e-3:
                drawn = generator.choice(np.flatnonzero(stock))
                break
        stock[drawn] -= 1
        left[client] -= 1
        histogram[client, drawn] += 1
    return histogram


def test_lda_in_turns_is_distributed_as_it_is_told():
    labels = np.repeat(np.arange(4), [9, 6, 6, 3])
    trials = 300
    ours, plain = np.zeros((2, trials, 2, 4))
    for seed in range(trials):
        parts = partition("lda", labels, clients=2, seed=seed, alpha=1.0, order="shuffled")
        ours[seed] = parts.class_histogram(labels, 4)
        plain[seed] = in_turns(labels, 2, 1.0, np.random.default_rng(10_000 + seed))
    for moment in (1, 2):
        one, other = ours**moment, plain**moment
        error = np.sqrt((one.var(axis=0) + other.var(axis=0)) / trials)
        assert (np.abs(one.mean(axis=0) - other.mean(axis=0)) / error).max() < 4


def test_in_turns_no_client_is_last():
    """At alpha 0.1 the last clients meet empty classes, far from their mixtures; in turns all do alike."""
    labels, alpha, clients = balanced(), 0.1, 20
    late = {}
    for order in ("clients", "shuffled"):
        distances = []
        for seed in range(10):
            drawn = np.random.default_rng(seed)  # the mixtures are drawn behind the ten classes' pools
            for _ in range(10):
                drawn.permutation(500)
            mixtures = drawn.dirichlet(np.full(10, alpha), size=clients)
            method = module.Lda(alpha=alpha, order=order)
            owner = method.owners(labels, clients, np.random.default_rng(seed), None)
            held = np.stack([np.bincount(labels[owner == client], minlength=10) for client in range(clients)])
            distances.append(np.abs(held / 250 - mixtures).sum(1) / 2)
        mean = np.mean(distances, axis=0)
        late[order] = mean[-5:].mean() - mean[:5].mean()
    assert late["clients"] > 0.4
    assert abs(late["shuffled"]) < 0.1


def test_renormalisation_by_hand():
    # Class 1 is exhausted. 0.2 and 0.0 get 1e-5 each: 0.20001 and 0.00001 of a sum of 0.20002.
    found = module._renormalise(np.array([0.2, 0.8, 0.0]), np.array([5, 0, 1]))
    np.testing.assert_allclose(found, [0.20001 / 0.20002, 0.0, 0.00001 / 0.20002], rtol=1e-12)
    # Only classes of probability 0 are in stock: what remains is shared evenly, not divided by 0.
    found = module._renormalise(np.array([1.0, 0.0, 0.0]), np.array([0, 3, 1]))
    np.testing.assert_allclose(found, [0.0, 0.5, 0.5])


def test_lda_exhausts_classes_in_the_only_possible_way():
    # One client takes all four samples, whatever it draws; the tied order of draws cannot matter.
    assert partition("lda", np.array([2, 0, 2, 1]), clients=1, seed=5).indices.tolist() == [0, 1, 2, 3]


def test_lda_is_fast_for_50_000_samples():
    labels = np.random.default_rng(0).integers(0, 100, 50_000)
    partition("lda", labels, clients=1000, seed=1337, alpha=0.1)


# --- the other kinds


def test_shards_of_a_sorted_split_by_hand():
    # 8 samples in 4 shards: {0,4} is class 0, {1,5} class 1, {2,6} class 2, {3,7} class 3; a client has two.
    labels = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    parts = partition("shards", labels, clients=2, seed=0, shards_per_client=2)
    histogram = parts.class_histogram(labels, 4)
    assert set(histogram.ravel().tolist()) == {0, 2}
    assert histogram.sum(axis=1).tolist() == [4, 4]
    assert histogram.sum(axis=0).tolist() == [2, 2, 2, 2]


def test_natural_clients_follow_the_codes_of_the_groups():
    groups = np.array([2, 0, 2, 5, 0, 2])
    parts = partition("natural", np.zeros(6, np.int64), clients=3, seed=9, groups=groups)
    assert [parts.client(i).tolist() for i in range(3)] == [[1, 4], [0, 2, 5], [3]]


def test_natural_with_fewer_clients_deals_whole_groups_evenly():
    groups = np.arange(60) % 6
    parts = partition("natural", np.zeros(60, np.int64), clients=4, seed=9, groups=groups)
    held = [np.unique(groups[parts.client(i)]).size for i in range(4)]
    assert sorted(held) == [1, 1, 2, 2]
    assert parts.sizes.tolist() == [10 * count for count in held]


def test_dirichlet_is_unbalanced_and_leaves_nobody_empty():
    labels = balanced(1000)
    sizes = partition("dirichlet", labels, clients=100, seed=3, alpha=0.05).sizes
    assert sizes.min() == 1  # some would have had none
    assert sizes.max() > 40  # four times the mean
    even = partition("dirichlet", labels, clients=10, seed=3, alpha=10_000).sizes
    assert np.abs(even - 100).max() <= 10


def test_validation_data_stays_out():
    available = np.arange(0, 100, 2)
    for name in LISTED:
        parts = partition(
            name, balanced(100), clients=5, seed=1, available=available, groups=np.arange(100) % 50
        )
        assert np.isin(parts.indices, available).all(), name


# --- errors and the record


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("lda", {"clients": 11}, "clients = 11 but only 10 training samples.*'sampled' draws with"),
        ("iid", {"clients": 0}, "clients = 0; at least 1"),
        ("iid", {"clients": 4, "available": np.arange(3)}, "only 3 training samples"),
        ("iid", {"available": np.array([1, 1, 2])}, "1 of the available samples are listed twice"),
        ("lda", {"alpha": 0.0}, "partition.alpha: 0.0 is out of range; allowed: a finite number above 0"),
        ("dirichlet", {"alpha": float("nan")}, "alpha: nan is out of range"),
        ("lda", {"alpha": float("inf")}, "alpha: inf is out of range; allowed: a finite number"),
        ("lda", {"alpha": None}, "alpha: expected float, found null"),
        ("sampled", {"alpha": 0.0}, "alpha: 0.0 is out of range; allowed: a finite number above 0"),
        ("sampled", {"samples_per_client": 0}, "samples_per_client: 0 is out of range; allowed: 1 to inf"),
        ("sampled", {"available": np.array([], np.int64)}, "no training samples"),
        ("shards", {"shards_per_client": 6}, "makes 12 shards of 10 available samples"),
        ("shards", {"shards_per_client": 0}, "shards_per_client: 0 is out of range"),
        ("natural", {}, "needs groups.*data.group_column"),
        ("natural", {"groups": np.zeros(10, np.int64)}, "clients = 2 but .* only 1 groups"),
    ],
)
def test_impossible_partitions_say_why(name, options, match):
    with pytest.raises((ChoiceError, PartitionError), match=match):
        partition(name, balanced(10), **({"clients": 2, "seed": 1} | options))


def test_a_client_is_a_view_nobody_can_write():
    parts = partition("iid", balanced(10), clients=3, seed=1)
    assert np.shares_memory(parts.client(1), parts.indices)
    with pytest.raises(ValueError, match="read-only"):
        np.random.default_rng(0).shuffle(parts.client(1))
    for index in (-1, 3):
        with pytest.raises(IndexError, match="3 clients"):
            parts.client(index)


def test_digest_sees_owners_and_not_only_samples():
    indices = np.arange(4)
    one = ListedPartition(indices.copy(), np.array([0, 2, 4]))
    other = ListedPartition(indices.copy(), np.array([0, 1, 4]))
    assert one.digest() == ListedPartition(indices.copy(), np.array([0, 2, 4])).digest()
    assert one.digest() != other.digest()
    assert len(one.digest()) == 16


@pytest.mark.parametrize(("clients", "classes"), [(10, 2), (1000, 100)])
def test_picture_is_drawn_at_both_extremes(tmp_path, clients, classes):
    labels = balanced(4000, classes)
    parts = partition("lda", labels, clients=clients, seed=1, alpha=0.1)
    path = tmp_path / "partition.png"
    picture(parts, labels, [f"class {index}" for index in range(classes)], path, title="by hand")
    with Image.open(path) as image:
        assert image.width > 800
        assert np.asarray(image.convert("L")).std() > 10  # something is on it


@pytest.mark.filterwarnings("error")
def test_names_of_classes_are_drawn_as_they_are(tmp_path):
    names = [
        r"$\celsius$",
        "$a$ and $",
        "a_b^c",
        "\\",
        r"\$",
        "cat\ndog\tcow",
        "😀 日本",
        "",
        "%s {x} <b>&",
        "x" * 300,
    ]
    labels = balanced(40, len(names))
    parts = partition("iid", labels, clients=4, seed=1)
    for suffix in ("png", "svg"):
        picture(parts, labels, names, tmp_path / f"partition.{suffix}", title=names[0])
    drawn = (tmp_path / "partition.svg").read_text()
    assert drawn.count(r"<!-- $\celsius$ -->") == 2  # as a title and as a class
    assert "<!-- cat dog cow -->" in drawn
