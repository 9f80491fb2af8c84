"""Which experiment a configuration is: what of it can change a result, and the short hash of that."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from cluster.configuration.profiles import PROFILES

#: What cannot change a result: where and how a run is computed, watched and cut short.
RESULT_FREE = frozenset(
    {
        "stop",
        "stop_after",
        "execution",
        "address",
        "detached",
        "actors",
        "callbacks",
        "cpus_per_actor",
        "label",
        "client_timeout_s",
        "on_client_error",
        "checkpoint_every",
        "checkpoint_uri",
        "tracking",
    }
)


#: The same, inside sections that do change results.
_PLACE = re.compile(r"data\.cache|devices\.tiers\.[^.]+\.(cpus|label(\..+)?)")

#: Keys that came after version 0.1 with the default that changes nothing: there they stay out of the hash, so
#: that older folders can be continued and compared.
_ADDED = {
    "adapter": None,
    "adapter.freeze_head": False,
    "aggregation.name": "mean",
    "aggregation.weighting": None,
    "algorithm.after_loss": "keep",
    "algorithm.copied_weights": False,
    "algorithm.cut_received": False,
    "algorithm.guard_layers": False,
    "algorithm.initial_mask": "random",
    "algorithm.spectral_mean": "entries",
    "attack.name": "none",
    "byzantine.factor": None,
    "byzantine.kind": "sign_flip",
    "byzantine.share": 0.0,
    "data.columns": None,
    "data.image_size": None,
    "data.length": None,
    "data.text_column": None,
    "data.tokenizer": None,
    "devices.cell_uplink": None,
    "devices.cells": None,
    "evaluate_attack.epsilon": 8 / 255,
    "evaluate_attack.every": 0,
    "evaluate_attack.name": "pgd",
    "evaluate_attack.norm": "linf",
    "evaluate_attack.random_start": True,
    "evaluate_attack.restarts": 1,
    "evaluate_attack.rows": 1000,
    "evaluate_attack.step": None,
    "evaluate_attack.steps": 20,
    "local.augment.crop": 0,
    "local.augment.flip": False,
    "evaluate_clients.adapt_steps": 5,
    "evaluate_clients.groups": False,
    "evaluate_clients.rows": "classes",
    "evaluate_clients.shots": [1, 5],
    "evaluate_clients.unseen": 0,
    "local.clip_norm": None,
    "local.lr_schedule": "exponential",
    "local.optimizer.momentum": 0.0,
    "local.optimizer.name": "sgd",
    "local.optimizer.nesterov": False,
    "model.weights": None,
    "objective.name": "classification",
    "partition.min_samples": 1,
    "partition.order": "clients",
    "privacy.dp.accountant": "rdp",
    "privacy.dp.adaptive": False,
    "privacy.dp.clip": None,
    "privacy.dp.delta": 1e-5,
    "privacy.dp.epsilon": None,
    "privacy.dp.noise_multiplier": None,
    "privacy.secure.masks": None,
    "privacy.secure.threshold": 2 / 3,
    "sparsity_schedule.name": "constant",
    "wire.grid": "exact",
}

#: The same of tiers: there the default is that of the profile's tier, else that of a tier without a profile;
#: what neither names is 0.
_ADDED_TO_TIERS = re.compile(r"devices\.tiers\.(.+)\.((?:flop|uplink|downlink)_energy|jitter)")


def digest_of(flat: Mapping[str, Any]) -> str:
    """Short hash of those of some dotted keys and values that can change a result."""
    relevant = relevant_of(flat)
    files = {"model.weights"}
    if relevant.get("model.name") in ("timm", "transformers"):
        files |= {"model.folder", "model.config"}
    for key in files & relevant.keys():  # wherever they lie
        if relevant[key] is None:
            continue
        relevant[key] = content_of(relevant[key])
    tokenizer = relevant.get("data.tokenizer")
    if isinstance(tokenizer, str) and os.path.isabs(tokenizer):
        inside = os.path.join(tokenizer, "tokenizer.json")
        relevant["data.tokenizer"] = content_of(inside if os.path.isdir(tokenizer) else tokenizer)
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=list).encode()).hexdigest()[:12]


def relevant_of(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What of a flat configuration, its values or their texts, can change a result.

    What came after 0.1 and has the default that changes nothing stays out.
    """
    usual, (phone,) = dict(_ADDED), PROFILES["uniform"].values()
    profile = PROFILES.get(str(flat.get("devices.profile")), {})
    for key in flat:
        if found := _ADDED_TO_TIERS.fullmatch(key):
            tier, figure = found.groups()
            usual[key] = profile.get(tier, phone).get(figure, 0.0)
    return {
        key: value
        for key, value in flat.items()
        if changes_results(key) and not (key in usual and value in (usual[key], str(usual[key])))
    }


def content_of(path: str) -> str:
    """Hash of the content of a file, or of the model in a folder; the path where there is none."""
    if os.path.isdir(path):
        parts = [file for file in sorted(os.listdir(path)) if file.endswith(("config.json", ".safetensors"))]
        whole = [[part, content_of(os.path.join(path, part))] for part in parts]
        return xxhash.xxh3_128_hexdigest(json.dumps(whole).encode())
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    except OSError:
        return path


@cache
def loaded_code() -> str:
    """The packages' source as this process found it when it first asked, kept with every result.

    Files that change under a run are not what it computes with.
    """
    return code_digest()


def code_digest() -> str:
    """Short hash of the packages' source as it lies on the disk now."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for path in sorted(p for room in ("algorithms", "cluster") for p in (root / room).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def changes_results(key: str) -> bool:
    """Whether a dotted key can change a result."""
    return key.split(".")[0] not in RESULT_FREE and not _PLACE.fullmatch(key)
