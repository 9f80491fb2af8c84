"""What was found: one JSON file and one Markdown page, rewritten with every result; and the picture."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.authors_curves import AUTHORS_CURVES
from tests.benchmarks.gpu.speed import HOSTS, PFL, RESNET, hosts_key, key_of
from tests.benchmarks.gpu.worker import Outcome

FORMAT = 1

#: The paper's rounds, and the steps of pfl-research's benchmark: 1,500 rounds of 50 users with 5 steps.
ROUNDS, PFL_STEPS = 700, 375_000

#: Methods of the paper's runs, in their order.
METHODS = ("sparsyfed", "fedavg", "topk")

NOT_MEASURED = "not measured yet"

Results = dict[str, dict[str, Any]]


class Book:
    """The results of all turns, kept in ``path`` and, as a page, beside it.

    Args:
        path: The JSON file; taken up where it exists.
        turn: What is known of this turn from the start.
    """

    def __init__(self, path: Path, turn: dict[str, Any]) -> None:
        self.path = path
        stored = {"turns": [], "results": {}, "elsewhere": []}
        stored |= json.loads(path.read_text()) if path.exists() else {}
        self.turns, self.results = [*stored["turns"], turn], stored["results"]
        self._elsewhere, self.turn = stored["elsewhere"], turn

    def on(self, device: str) -> None:
        """Name this turn's device; what was found on another one is kept apart, the paper's runs go on."""
        self.turn["device"] = device
        for key, result in list(self.results.items()):
            if result["part"] != "paper" and self.turns[result["turn"]].get("device") != device:
                self._elsewhere.append({"key": key, **self.results.pop(key)})

    def put(self, key: str, part: str, outcome: Outcome) -> None:
        """Keep a result and write both files; for want of time nothing replaces what was found."""
        known = self.results.get(key, {"state": "left out"})
        if known["state"] != "done" or outcome.state in ("done", "failed") or outcome.found:
            self.results[key] = {"part": part, **asdict(outcome), "turn": len(self.turns) - 1}
        self.write()

    def done(self, key: str) -> bool:
        """Whether the same code has found it on the same device, in an earlier turn."""
        result = self.results.get(key)
        if result is None or result["state"] != "done":
            return False
        then = self.turns[result["turn"]]
        return all(then.get(each) == self.turn.get(each) for each in ("device", "torch", "code"))

    def write(self) -> None:
        """Write both files, each as a whole or not at all."""
        stored = {"format": FORMAT, "turns": self.turns, "results": self.results}
        stored["elsewhere"] = self._elsewhere
        for path, text in (
            (self.path, json.dumps(stored, indent=1) + "\n"),
            (self.path.with_suffix(".md"), page(self.turns, self.results)),
        ):
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_text(text)
            os.replace(temporary, path)


def key_of_run(method: str) -> str:
    """A run's name in the results."""
    return f"paper-cifar10, LDA 1, 95 %: {method}"


def page(turns: Sequence[dict[str, Any]], results: Results) -> str:
    """The Markdown page."""
    found = results.get("device", {}).get("found", {})
    last = turns[-1]
    parts = [
        "# On a GPU" if _on_a_gpu(results) else "# A rehearsal on the CPU",
        "\n".join(f"- {key}: {value}" for key, value in {**found, **last}.items() if key != "code"),
        "## Aims\n\n" + _table(["what", "measured", "aim"], aims(results)),
        "## Checks\n\n" + _table(["check", "result"], _checks(results)),
        "## Speed\n\n" + _table(["case", "steps/s", "client ms", "MiB"], _speed(results)),
    ]
    for key, result in results.items():
        if result["found"].get("kernels"):
            parts.append(f"## {key[0].upper()}{key[1:]}\n\n{_kernels(result['found'])}")
    parts.append("## The paper's experiment\n\n" + _table(_RUN_COLUMNS, _runs(results)))
    for method in METHODS:
        if phases := _run(results, method).get("phases"):
            shown = ", ".join(f"{name} {seconds:.3f}" for name, seconds in phases.items() if seconds >= 5e-4)
            parts.append(f"Seconds of a round by phase, {method}: {shown}.")
    codes = [turn.get("code") for turn in turns]
    older = [key for key, r in results.items() if r["state"] != "left out" and codes[r["turn"]] != codes[-1]]
    if older:
        parts.append(f"## Found by earlier code\n\n{len(older)}: {'; '.join(older)}")
    left = list(_left_out(results))
    parts.append("## Left out\n\n" + (_table(["state", "why", "what"], left) if left else "Nothing."))
    return "\n\n".join(parts) + "\n"


def aims(results: Results) -> list[tuple[str, str, str]]:
    """What the issue of speed comes down to: (what, measured, aim)."""

    def rate(key: str) -> float | None:
        result = results.get(key)
        return result["found"].get("steps/s") if result and result["state"] == "done" else None

    def total(workload: str, method: str) -> tuple[float, str] | None:
        rates: dict[str, float] = {}
        for processes in sorted(HOSTS):
            keys = [hosts_key(workload, method, processes)]
            if processes == 1:
                keys += [key_of(workload, method, "float32", graphs) for graphs in (True, False)]
            if measured := [each for key in keys if (each := rate(key)) is not None]:
                rates[keys[0]] = max(measured)
        best = max(rates, key=rates.__getitem__, default=None)
        return None if best is None else (rates[best], best.rpartition(", ")[2])

    rows = []
    for method in ("fedavg", "sparsyfed"):
        best = total(RESNET, method)
        shown = f"{best[0]:,.0f} ({best[1]})" if best else NOT_MEASURED
        rows.append((f"ResNet-18, batch 16, float32, {method}: steps/s in total", shown, "more than 1,500"))
    for graphs in (True, False):
        sparse, dense = (
            rate(key_of(RESNET, method, "float32", graphs)) for method in ("sparsyfed", "fedavg")
        )
        shown = f"{dense / sparse:.2f}" if sparse and dense else NOT_MEASURED
        way = "graphs" if graphs else "launched"
        rows.append((f"SparsyFed's step over dense, ResNet-18, {way}", shown, "at most 1.3"))
    best = total(PFL, "fedavg")
    shown = f"{PFL_STEPS / best[0]:,.0f} s ({best[1]})" if best else NOT_MEASURED
    rows.append(("pfl-research's benchmark: 375,000 steps of batch 10, training alone", shown, "under 60 s"))
    for method in METHODS:
        seconds = _run(results, method).get("seconds a round")
        shown = f"{seconds * ROUNDS / 60:.1f} min" if seconds else NOT_MEASURED
        rows.append((f"{ROUNDS} rounds of paper-cifar10, {method}", shown, "under 5 min"))
    return rows


def draw(stored: Path) -> Path:
    """Draw the curves beside the authors' and the steps a second as a PNG beside the JSON file."""
    from matplotlib.figure import Figure

    from cluster.records.plots import COLOURS, finish

    book = json.loads(stored.read_text())
    results, about = book["results"], book["results"].get("device", {}).get("found", {})
    rows = [(key, result["found"]["steps/s"]) for key, result in _rates(results) if key.startswith(RESNET)]
    figure = Figure(figsize=(11, max(4.6, 0.19 * len(rows) + 1)), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(1.2, 1))
    for colour, method in zip(COLOURS, METHODS, strict=False):
        rounds, accuracy = zip(*AUTHORS_CURVES[method], strict=True)
        curves.plot(rounds, [100 * a for a in accuracy], color=colour, ls="--", lw=1, alpha=0.8)
        own = _run(results, method).get("accuracy", [])
        curves.plot([r for r, _ in own], [100 * a for _, a in own], color=colour, lw=2, label=method)
    curves.plot([], [], color="#777777", ls="--", lw=1, label="the authors' logs")
    title = "CIFAR-10, ResNet-18, LDA 1, 95 %" if _on_a_gpu(results) else "A rehearsal, of another model"
    curves.set(xlabel="round", ylabel="test accuracy (%)", title=title, ylim=(0, 100))
    curves.legend(frameon=False, loc="lower right")
    bars.barh([key.partition(": ")[2] for key, _ in rows], [rate for _, rate in rows], color=COLOURS[5])
    bars.set_ylim(max(len(rows), 8) - 0.5, -0.5)
    bars.tick_params(axis="y", labelsize=8)
    bars.set(xlabel="steps a second, ResNet-18, batch 16", title=about.get("device", "").partition(" (")[0])
    for axes in (curves, bars):
        finish(axes)
    path = stored.with_suffix(".png")
    figure.savefig(path, dpi=150)
    return path


# ------------------------------------------------------------------------------------------------ inside


def _on_a_gpu(results: Results) -> bool:
    return not str(results.get("device", {}).get("found", {}).get("device")).startswith("cpu")


def _run(results: Results, method: str) -> dict[str, Any]:
    found: dict[str, Any] = results.get(key_of_run(method), {}).get("found", {})
    return found


def _checks(results: Results) -> Iterator[tuple[str, str]]:
    for key, result in results.items():
        if result["part"] == "checks" and key != "device" and result["state"] != "left out":
            done = result["state"] == "done"
            yield key, result["found"].get("found", "") if done else f"**{result['state']}**: {result['why']}"


def _left_out(results: Results) -> Iterator[tuple[str, str, str]]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for key, result in results.items():
        if result["state"] != "done":
            reasons.setdefault((result["state"], result["why"]), []).append(key)
    for (state, why), keys in reasons.items():
        yield state, why, f"{len(keys)}: {'; '.join(keys)}" if len(keys) > 1 else keys[0]


def _rates(results: Results) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((key, result) for key, result in results.items() if "steps/s" in result["found"])


def _speed(results: Results) -> Iterator[tuple[str, ...]]:
    for key, result in _rates(results):
        found = result["found"]
        memory = found.get("MiB", found.get("MiB each"))
        cells = (found["steps/s"], found.get("client ms"), memory)
        yield (
            key,
            *("" if cell is None else f"{cell:,.1f}" if cell < 100 else f"{cell:,.0f}" for cell in cells),
        )


def _kernels(found: dict[str, Any]) -> str:
    intro = (
        f"{found['wall us a step']:,.0f} us a step by the clock while being profiled, "
        f"{found['device us a step']:,.0f} of them busy, in {found['launches a step']:,.0f} launches."
    )
    rows = [
        (
            f"`{k['name'].replace('|', '/')}`",
            f"{k['us a step']:,.1f}",
            f"{100 * k['share']:.1f}",
            f"{k['calls a step']:.1f}",
        )
        for k in found["kernels"]
    ]
    return intro + "\n\n" + _table(["kernel", "us a step", "%", "calls"], rows)


_RUN_COLUMNS = [
    "method",
    "rounds",
    "accuracy %, last five",
    "the authors' there",
    "sparsity %",
    "s a round",
    "settings",
]


def _runs(results: Results) -> Iterator[tuple[str, ...]]:
    for method in METHODS:
        found = _run(results, method)
        if not found:
            yield (method, *[NOT_MEASURED] * 6)
            continue
        last = found["accuracy"][-5:]
        theirs = [a for r, a in AUTHORS_CURVES[method] if last and last[0][0] <= r <= last[-1][0]]
        mean = [
            f"{100 * sum(values) / len(values):.1f}" if values else ""
            for values in ([a for _, a in last], theirs)
        ]
        settings = f"{found['model']}, {found['precision']}, {'graphs' if found['graphs'] else 'launched'}"
        seconds = found.get("seconds a round")
        yield (
            method,
            f"{found['rounds']} of {found['of']}",
            *mean,
            f"{100 * (found['sparsity'] or 0):.1f}",
            f"{seconds:.2f}" if seconds else "",
            settings,
        )


def _table(head: Sequence[str], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        "| " + " | ".join(str(cell).replace("\n", " ").replace("|", "\\|") for cell in row) + " |"
        for row in rows
    ]
    return "\n".join(lines)
