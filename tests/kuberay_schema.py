"""The part of KubeRay's own definition of a RayJob that ray_configs/kuberay-rayjob.yaml uses, as JSON schema.

``python -m tests.kuberay_schema ray.io_rayjobs.yaml`` writes ``tests/kuberay_rayjob.schema.json`` anew from
the operator's CustomResourceDefinition (in its repository: helm-chart/kuberay-operator/crds/).
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

JOB = Path(__file__).parents[1] / "ray_configs" / "kuberay-rayjob.yaml"
SCHEMA = Path(__file__).with_name("kuberay_rayjob.schema.json")
#: Of which project, version and licence the definition is.
ORIGIN = (
    "Derived by `python -m tests.kuberay_schema` from {file} (sha256 {digest}) of KubeRay, "
    "https://github.com/ray-project/kuberay, master of August 2026, newer than 1.6; Apache License 2.0."
)
#: What both languages say in the same words; the rest is documentation and orders to Kubernetes.
RULES = ("type", "format", "enum", "pattern", "anyOf", "minimum", "maximum", "minLength", "minItems")


def part_of(schema: dict[str, Any], used: Any, path: str = "") -> dict[str, Any]:
    """What ``schema`` says of the fields of ``used``, all others refused.

    Args:
        schema: OpenAPI 3 schema of a CRD's version.
        used: What the file has there.
        path: Where that is, for complaints.

    Raises:
        SystemExit: A field is none of the CRD's.
    """
    part = {rule: schema[rule] for rule in RULES if rule in schema}
    if isinstance(used, list):
        part["items"] = part_of(schema["items"], _together(used), f"{path}[]")
    elif "properties" in schema:
        if unknown := used.keys() - schema["properties"].keys():
            raise SystemExit(f"{path or JOB.name}: {', '.join(sorted(unknown))}: no field of the CRD")
        part["properties"] = {
            key: part_of(schema["properties"][key], value, f"{path}.{key}") for key, value in used.items()
        }
        if "required" in schema:
            part["required"] = schema["required"]
        part["additionalProperties"] = False
    elif isinstance(kept := schema.get("additionalProperties"), dict):
        part["additionalProperties"] = {rule: kept[rule] for rule in RULES if rule in kept}
    return part


def _together(used: list[Any]) -> Any:
    """One value that has every field of a list's items."""
    if not all(isinstance(each, dict) for each in used):
        return used[0]
    return {key: _together([each[key] for each in used if key in each]) for each in used for key in each}


def main(path: Path) -> None:
    """Write the schema from the operator's CRD."""
    definition, job = yaml.safe_load(path.read_bytes()), yaml.safe_load(JOB.read_bytes())
    (version,) = (each for each in definition["spec"]["versions"] if job["apiVersion"].endswith(each["name"]))
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": ORIGIN.format(file=path.name, digest=hashlib.sha256(path.read_bytes()).hexdigest()),
        **part_of(version["schema"]["openAPIV3Schema"], job),
    }
    SCHEMA.write_text(json.dumps(schema, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
