"""What Ray's metrics tell of a run: gauges for Prometheus, drawn by ray_configs/grafana-dashboard.json.

The driver actor sets them once a round, from the line that it has stored. Ray puts ``ray_`` before each name
and offers them on the metrics port of the driver's node for as long as the run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.configuration.config import Config
from cluster.measures import Measure
from cluster.workload.objectives import selecting

#: Gauges by name, and what they say.
GAUGES = {
    "sparsyfed_round": "The last round.",
    "sparsyfed_quality": "What selects (tag measure), on test data where that is read, else on validation.",
    "sparsyfed_uplink_bytes": "Encoded bytes that clients sent in the round.",
    "sparsyfed_downlink_bytes": "Encoded bytes that clients were sent in the round.",
    "sparsyfed_clients_per_second": "Clients that were played, by wall-clock seconds of the round.",
    "sparsyfed_idle_share": "Share of the round's actor seconds in which nothing was computed, 0 to 1.",
    "sparsyfed_lost_actors": "Actors that were lost in the round.",
}

#: What actors do, as in the keys of their seconds.
_WORK = ("train", "encode", "decode", "fold", "evaluate")


class Gauges:
    """The gauges of one run.

    Args:
        run: Its name, a tag of each.
        config: Its configuration.
    """

    def __init__(self, run: str, config: Config) -> None:
        from ray.util.metrics import Gauge

        self._selects = selecting(config)
        tags = {"run": run, "method": config.algorithm.name, "measure": self._selects.key}
        self._gauges = {
            name: Gauge(name, text, tag_keys=tuple(tags)).set_default_tags(tags)
            for name, text in GAUGES.items()
        }

    def set(self, line: Mapping[str, Any]) -> None:
        """Tell of a round; what it did not measure stays as it was."""
        for name, value in values_of(line, self._selects).items():
            if value is not None:
                self._gauges[name].set(value)


def values_of(line: Mapping[str, Any], selects: Measure) -> dict[str, float | None]:
    """Every gauge after a round; None where the round did not measure it."""
    seconds = line["time/round_s"]
    worked = sum(line[f"time/clients_{work}_s"] for work in _WORK)
    values = (
        line["round"],
        line.get(f"test/{selects.key}", line.get(f"val/{selects.key}")),
        line["comm/uplink_bytes"],
        line["comm/downlink_bytes"],
        line["clients/trained"] / seconds,
        # The last evaluation may have begun in the round before, whose seconds these are not.
        max(0.0, 1.0 - worked / (line["time/actors"] * seconds)),
        line["time/lost_actors"],
    )
    return dict(zip(GAUGES, values, strict=True))
