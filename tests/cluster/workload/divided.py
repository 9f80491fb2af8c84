"""A partition by its name, as a configuration has it drawn."""

from cluster.configuration.choices import build_choice


def partition(name, labels, *, clients, seed, groups=None, available=None, **options):
    """What ``partition.name`` with ``options`` makes of labels."""
    partitioner = build_choice("partition", name, options)
    return partitioner.divide(labels, clients=clients, seed=seed, groups=groups, available=available)
