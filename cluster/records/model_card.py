"""The card of a trained model: a README.md that people read, with the metadata in front that hubs read.

Its form is the Hugging Face hub's: YAML between two lines of dashes, results as a ``model-index``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cluster import __version__
from cluster.configuration.config import Config
from cluster.measures import SHOWN
from cluster.records.checkpoint import write_atomically
from cluster.records.introduction import facts, run_name
from cluster.records.model_file import evaluated
from cluster.records.run_folder import RunFolder
from cluster.workload.datasets import Dataset

#: The hub's name of a task: by the objective, else by what the samples are.
_TASKS = {"language_model": "text-generation", "sequence_classification": "text-classification"}
_SPLITS = {"test": "test", "val": "validation"}

_IN_THE_RUN = """\
`model.safetensors` beside this file holds the effective weights under the names of the plain torch module:

```python
from safetensors.torch import load_file

model.load_state_dict(load_file("model.safetensors"))
```
"""

_EXPORT = """
`sparsyfed export . --to hub` makes a folder of it that can be uploaded, `--to onnx` one for other runtimes.
"""


def write_card(
    folder: RunFolder, config: Config, dataset: Dataset, summary: Mapping[str, Any], line: Any
) -> None:
    """Write a run's card beside its model.

    Args:
        folder: The run's folder.
        config: Its configuration.
        dataset: What it was trained on.
        summary: What ``result.json`` holds.
        line: The last round's line with its evaluation.
    """
    use = _IN_THE_RUN + _EXPORT * (config.adapter is None)  # what is exported are whole models
    text = card(config, dataset, summary, line, use)
    write_atomically(folder.card_file, text.encode())


def card(
    config: Config,
    dataset: Dataset,
    summary: Mapping[str, Any],
    line: Mapping[str, Any],
    use: str,
    library: str = "pytorch",
) -> str:
    """The card's text; nothing in it names a place of this machine.

    Args:
        config: The run's configuration.
        dataset: What it was trained on.
        summary: What ``result.json`` holds.
        line: The last round's line with its evaluation.
        use: How the model is loaded, in Markdown.
        library: The hub's name of what loads it.
    """
    metadata = {"library_name": library, **_metadata(config, dataset, line)}
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    told = "  \n".join(facts(config))
    done, planned = summary["rounds"], config.rounds
    stopped = summary.get("stopped_by")  # results of 0.1 do not say
    ended = f"after {done} of {planned} rounds" + f", {stopped}" * bool(stopped)
    return (
        f"---\n{head}---\n\n# {run_name(config)} on {dataset_name(config)}\n\n"
        f"Trained by simulated federated learning with sparsyfed {__version__}.\n\n{told}\n\n"
        f"## Results\n\nOf the whole model, {ended}:\n\n{_table(config, summary, line)}\n"
        f"## Use\n\n{use}\n## Where it comes from\n\n{_origin(config, dataset, summary)}"
    )


def dataset_name(config: Config) -> str:
    """The data set's name as people say it: of a path its last part, of one's own code the attribute."""
    return Path(config.data.path or config.data.name).name.rpartition(":")[2]


def task_of(config: Config, dataset: Dataset) -> str | None:
    """The hub's name of what is learned, such as image-classification; None where it has none."""
    if config.objective.name in _TASKS:
        return _TASKS[config.objective.name]
    shape, stored = dataset.input_shape, dataset.train.inputs.dtype
    what = {1: "tabular", 3: "image" if stored == np.uint8 else None}.get(len(shape))
    if config.data.features is not None:
        what = "audio"
    if dataset.vocabulary:
        what = "text"
    does = "regression" if config.objective.name == "regression" else "classification"
    known = config.objective.name in ("classification", "multilabel", "regression")
    return f"{what}-{does}" if what and known and (does, what) != ("regression", "image") else None


def _metadata(config: Config, dataset: Dataset, line: Mapping[str, Any]) -> dict[str, Any]:
    """What a hub reads of a card."""
    objective, data, task = config.build_objective(), config.data, task_of(config, dataset)
    on_hub = data.path is None and re.fullmatch(r"[\w.-]+/[\w.-]+", data.name) is not None
    head: dict[str, Any] = {}
    if task is not None:
        head["pipeline_tag"] = task
    method = config.algorithm.name.rpartition(":")[2]
    found: dict[str, list[dict[str, Any]]] = {}
    for key, value in evaluated(config, line).items():
        split, _, metric = key.partition("/")
        title = next(measure.title for measure in objective.measures if measure.key == metric)
        found.setdefault(split, []).append({"type": metric, "value": float(value), "name": title})
    named: dict[str, Any] = {
        "type": data.name if on_hub else dataset_name(config),
        "name": dataset_name(config),
    }
    if on_hub and data.revision is not None:
        named["revision"] = data.revision
    results: list[dict[str, Any]] = [
        {
            "task": {"type": task or "other"},
            "dataset": named | {"split": data.test_split if split == "test" else _SPLITS[split]},
            "metrics": metrics,
        }
        for split, metrics in found.items()
    ]
    if on_hub:
        head["datasets"] = [data.name]
    return {
        **head,
        "tags": list(dict.fromkeys(["federated-learning", "sparsyfed", method])),
        "metrics": [measure.key for measure in objective.measures],
        "model-index": [{"name": run_name(config), "results": results}],
    }


def _table(config: Config, summary: Mapping[str, Any], line: Mapping[str, Any]) -> str:
    """Results and costs as a table in Markdown."""
    rows, measures = [], {measure.key: measure for measure in config.build_objective().measures}
    for key, value in evaluated(config, line).items():
        split, _, metric = key.partition("/")
        rows.append((f"{_SPLITS[split]} {measures[metric].title}", measures[metric].text(value)))
    for key, title, unit in (
        ("sparsity", "prunable weights that are zero", "share"),
        ("uplink_bytes", "sent up by all clients", "bytes"),
        ("downlink_bytes", "sent down to all clients", "bytes"),
        ("flops_sparse", "training cost of all clients", "FLOP"),
    ):
        factor, shown = SHOWN[unit]
        rows.append((title, f"{factor * summary[key]:.4g} {shown}"))
    body = "".join(f"| {title} | {value} |\n" for title, value in rows)
    return f"| | |\n|---|---|\n{body}"


def _origin(config: Config, dataset: Dataset, summary: Mapping[str, Any]) -> str:
    """What it was trained by, so that it can be trained again."""
    paper = f"Method: {config.method.paper}.\n\n" if config.method.paper else ""
    hashes = ", ".join(
        f"{name.removesuffix('_hash')} `{summary[name]}`"
        for name in ("config_hash", "code_hash", "partition_hash")
    )
    machine = f"torch {summary['torch']}, {summary['cpu_capability']}"
    return f"{paper}Hashes: {hashes}, data `{dataset.fingerprint}`; {machine}.\n"
