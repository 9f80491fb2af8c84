"""Names and numbers that every sink accepts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

#: MLflow's own limit (mlflow/utils/validation.py), below those of the others.
KEY_LENGTH = 250


def numbers_in(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among some values, under names that every sink accepts.

    MLflow would store infinity as 1.8e308 and ruin the chart's scale. Its page that compares runs draws the
    metric that was logged first: what selects, the first metric on test data in a line, comes before all
    others.
    """
    first = next((key for key in values if key.startswith("test/")), None)
    return {
        metric_name(key): float(value)
        for key, value in sorted(values.items(), key=lambda item: item[0] != first)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def metric_name(text: str) -> str:
    """A key that MLflow accepts: its characters, no empty or dotted path segments, at most 250 characters."""
    segments = re.sub(r"[^\w\-. :/]", "_", text).split("/")
    return "/".join(part for part in segments if part.strip(".") != "")[:KEY_LENGTH] or "_"
