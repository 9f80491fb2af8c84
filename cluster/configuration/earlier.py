"""Keys that older versions' configurations have of what they did not choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.configuration.choices import KINDS, fields

#: Keys that up to 0.1 stood in a section whatever was chosen, with their defaults. In older folders they fall
#: away; they still enter the hash, so that no experiment gets another one.
EARLIER: dict[str, dict[str, Any]] = {
    "partition": {"alpha": 1.0, "shards_per_client": 2, "samples_per_client": 50},
    "availability": {"low": 0.2, "high": 0.8, "phase": 0.0, "slot": 600.0, "path": None},
    "schedule": {
        "over_selection": 1.0,
        "deadline": None,
        "buffer": None,
        "concurrency": None,
        "staleness_exponent": 0.5,
        "max_staleness": None,
    },
}


def earlier_keys(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys that up to 0.1 stood beside those of the choices in a configuration, with their defaults.

    Args:
        flat: Its dotted keys, or the names among them.
    """
    found: dict[str, Any] = {}
    for key, name in flat.items():
        path, _, last = key.rpartition(".")
        section = path.rpartition(".")[2]
        if last == "name" and section in EARLIER and isinstance(name, str) and name in KINDS[section].names:
            own = fields(section, name)
            found |= {f"{path}.{k}": default for k, default in EARLIER[section].items() if k not in own}
    return found
