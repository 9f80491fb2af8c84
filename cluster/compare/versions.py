"""Versions of measures: what was measured by different rules is marked, and never goes into one mean.

A run's result says by which version of its rule each family of metrics was measured (``{"flops/sparse": 2}``;
1 where nothing is said). A family is a metric and those whose names go on after it, as
``flops/sparse_total`` after ``flops/sparse``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from cluster.compare.reading import Run

#: Version of a run that has no result yet, and so does not say.
_UNKNOWN = 0

_MOST_NAMES = 5


def version(run: Run, family: str) -> int:
    """By which version of its rule a run measured a family of metrics."""
    return _UNKNOWN if run.measures is None else run.measures.get(family, 1)


def newest(runs: Iterable[Run]) -> dict[str, int]:
    """The newest version of each family that some of the runs name."""
    runs = list(runs)
    families = sorted({family for run in runs for family in run.measures or ()})
    return {family: max(version(run, family) for run in runs) for family in families}


def is_of(metric: str, family: str) -> bool:
    """Whether a metric belongs to a family."""
    return metric.startswith(family) and metric[len(family) :][:1] in ("", "_", "/")


def outdated(runs: Sequence[Run], metrics: Collection[str], versions: Mapping[str, int]) -> bool:
    """Whether some of the runs measured one of the metrics by another version than the newest."""
    return any(
        version(run, family) != current
        for family, current in versions.items()
        if any(is_of(metric, family) for metric in metrics)
        for run in runs
    )


def unmixed(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Runs of one group, each without what it measured by an older version than the newest of the group."""
    versions = newest(runs)

    def stays(run: Run, metric: str) -> bool:
        return not outdated([run], [metric], versions)

    return tuple(
        replace(run, series={metric: own for metric, own in run.series.items() if stays(run, metric)})
        for run in runs
    )


def differences(runs: Sequence[Run]) -> list[str]:
    """A sentence for each family that the runs did not all measure by the same version."""
    sentences = []
    for family, current in newest(runs).items():
        others = [run.name for run in runs if version(run, family) != current]
        if not others:
            continue
        named = ", ".join(others[:_MOST_NAMES])
        more = f" and {len(others) - _MOST_NAMES} more" if len(others) > _MOST_NAMES else ""
        sentences.append(
            f"{family} measured by different rules: version {current}, and an older or unknown one in runs "
            f"{named}{more}; run again to compare"
        )
    return sentences
