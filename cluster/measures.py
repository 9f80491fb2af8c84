"""What is measured: every key of a round's line and of a result, its unit, and whether more of it is better.

This is the one declaration. Summaries, progress, comparisons, studies and MLflow read it, and
``docs/measures.md`` is written from it. Names in angle brackets stand for others:

- ``<metric>``: each metric of the objective, ``accuracy`` and ``loss`` of classification;
- ``<selects>``: the first of them, which selects the best round, checkpoint and configuration;
- ``<split>``: ``test`` or ``val``; ``<tier>``: a device tier; ``<name>``: what a method calls it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

#: What counts as better; None where it is no contest.
Better = Literal["higher", "lower"] | None

#: Units as they are stored: factor and name of the unit as they are shown.
SHOWN = {"share": (100.0, "%"), "bytes": (1e-6, "MB"), "FLOP": (1e-9, "GFLOP"), "J": (1e-3, "kJ")}


@dataclass(frozen=True)
class Measure:
    """One measure, or a family of them.

    Attributes:
        key: Its name, as in ``train/loss``; may hold names in angle brackets.
        title: The same in words.
        unit: ``share`` (of 1, shown in percent), ``bytes``, ``FLOP``, ``s`` ...; empty for a plain number.
        meaning: One sentence.
        better: What counts as better.
        when: Where it is there; everywhere if empty.
        version: Of the rule by which it is measured; measures by different rules are not compared.
    """

    key: str
    title: str
    unit: str
    meaning: str
    better: Better = None
    when: str = ""
    version: int = 1

    def merit(self, value: float) -> float:
        """``value`` with a sign by which the better one is the larger one."""
        return -value if self.better == "lower" else value

    @property
    def grows(self) -> bool:
        """Whether it adds up since the run began, so that to reach a value is to have spent it."""
        return self.key.endswith("_total") or self.key in ("time/simulated_s", "privacy/epsilon")

    @property
    def scale(self) -> float:
        """What a stored value is multiplied by to be shown."""
        return SHOWN.get(self.unit, (1.0, ""))[0]

    @property
    def label(self) -> str:
        """Title and unit as on an axis."""
        return f"{self.title} ({self.shown_unit})" if self.shown_unit else self.title

    @property
    def shown_unit(self) -> str:
        """The unit of values as they are shown, such as %; empty for a plain number."""
        return SHOWN.get(self.unit, (1.0, self.unit))[1]

    def figure(self, value: float, digits: int = 1) -> str:
        """A value as a table shows it, without its unit; of a share with so many decimals."""
        return f"{self.scale * value:.{digits}f}" if self.unit == "share" else f"{self.scale * value:.4g}"

    def text(self, value: float | None) -> str:
        """A value as it is shown; a dash for None."""
        if value is None:
            return "-"
        return f"{100 * value:.1f}%" if self.unit == "share" else f"{value:.4g}"


#: What every line holds whatever is learned; lines are what ``rounds.jsonl`` and MLflow have of a round.
MEASURES: tuple[Measure, ...] = (
    Measure("round", "round", "",
            "Number of the round; 0 is a stage that a method asks for before round 1."),
    Measure("timestamp", "time of day", "s since 1970",
            "When the round was measured; not the same when it is computed again."),
    Measure("train/loss", "training loss", "",
            "Mean loss over the local steps, of those whose updates count, by samples.", "lower"),
    Measure("train/lr", "learning rate", "", "Learning rate of the clients in the round."),
    Measure("sparsity/global", "sparsity", "share",
            "Share of the prunable weights of the global model that are zero."),
    Measure("sparsity/target", "target sparsity", "share",
            "What clients without a sparsity of their tier's cut to in the round.",
            when="with a sparsity_schedule that is not constant"),
    Measure("sparsity/upload", "sparsity of uploads", "share",
            "Mean share of the prunable weights that uploads leave out, of those whose updates count."),
    Measure("sparsity/layers", "sparsity of layers", "share",
            "Sparsity of each prunable layer, a list in the order of the layers."),
    Measure("masks/regrowth", "regrowth", "weights",
            "Prunable weights that were 0 before the round and are not after it."),
    Measure("masks/regrowth_share", "regrowth", "share", "The same over all prunable weights."),
    Measure("masks/deactivation", "deactivation", "weights",
            "Prunable weights that were not 0 before the round and are after it."),
    Measure("masks/deactivation_share", "deactivation", "share", "The same over all prunable weights."),
    Measure("masks/client_regrowth_before_cut", "client regrowth before the cut", "weights",
            "Mean number of weights that were 0 as received and are not after local training, before "
            "the final cut, of those whose updates count."),
    Measure("masks/client_regrowth", "client regrowth", "weights", "The same after the final cut."),
    Measure("masks/client_regrowth_share", "client regrowth", "share",
            "The same over all prunable weights."),
    Measure("masks/client_deactivation", "client deactivation", "weights",
            "Mean number of weights that were not 0 as received and are after the final cut, of those"
            " whose updates count."),
    Measure("masks/client_cut", "client cut", "weights",
            "Mean number of a client's weights, received or trained, that its final cut sets to 0: "
            "what SparsyFed's authors log and call regrowth."),
    Measure("masks/consensus", "consensus", "", "Agreement of the cohort's masks, 1 where all are equal."),
    Measure("masks/overlap", "overlap", "",
            "Intersection over union of the global model's nonzeros before and after the round."),
    Measure("masks/overlap_10", "overlap, 10 rounds", "",
            "The same with those of ten rounds before.", when="every tenth round from 20 on"),
    Measure("comm/uplink_bytes", "sent up", "bytes", "Bytes that clients sent, as encoded.", "lower"),
    Measure("comm/downlink_bytes", "sent down", "bytes",
            "Bytes that clients were sent, as encoded.", "lower"),
    Measure("comm/uplink_bytes_per_client", "sent up by a client", "bytes",
            "Mean over the clients that trained.", "lower"),
    Measure("comm/downlink_bytes_per_client", "sent down to a client", "bytes",
            "Mean over the clients that trained.", "lower"),
    Measure("comm/uplink_nonzero_bytes", "nonzeros sent up", "bytes",
            "4 bytes a nonzero that was sent: the paper's accounting.", "lower"),
    Measure("comm/downlink_nonzero_bytes", "nonzeros sent down", "bytes",
            "4 bytes a nonzero that clients were sent: the paper's accounting.", "lower"),
    Measure("comm/dense_bytes", "a dense model sent", "bytes",
            "What dense float32 models for all clients of the round take, one way."),
    Measure("comm/uplink_bytes_total", "sent up so far", "bytes", "Since the run began.", "lower"),
    Measure("comm/downlink_bytes_total", "sent down so far", "bytes", "Since the run began.", "lower"),
    Measure("comm/base_bytes_total", "base sent so far", "bytes",
            "What sent down holds of the frozen base, which a client is sent before its first model.",
            "lower", when="adapter"),
    Measure("comm/clamped_values", "values clamped", "values",
            "Values of updates that clients cut to the limit of the round's grid: 16 times the next power of "
            "two from the largest global weight.", "lower", when="wire.grid"),
    Measure("secure/uplink_bytes", "keys and shares sent up", "bytes",
            "What clients sent beside their updates so that the server sees sums alone; part of what is "
            "sent up.", "lower", when="privacy.secure"),
    Measure("secure/downlink_bytes", "keys and shares sent down", "bytes",
            "The same of what they were sent.", "lower", when="privacy.secure"),
    Measure("secure/recovered", "clients recovered", "clients",
            "Clients that exchanged keys and are not in the sum: the others' shares took out their masks.",
            when="privacy.secure"),
    Measure("secure/lost", "round lost", "", "1 where too few clients answered to unmask the sum, else 0.",
            "lower", when="privacy.secure"),
    Measure("flops/dense", "dense training cost", "FLOP",
            "Training FLOPs of all clients if no zero were exploited.", "lower"),
    Measure("flops/sparse", "training cost", "FLOP",
            "Training FLOPs of all clients if every zero were exploited; the weight gradient costs "
            "the share of its entries that the method uses.", "lower", version=2),
    Measure("flops/layers", "training cost of layers", "FLOP", "The same of each prunable layer, a list."),
    Measure("flops/dense_total", "dense training cost so far", "FLOP", "Since the run began.", "lower"),
    Measure("flops/sparse_total", "training cost so far", "FLOP", "Since the run began.", "lower"),
    Measure("energy/joules", "energy", "J",
            "What training, receiving and sending took the devices of all clients; of those that dropped out "
            "what receiving did.", "lower"),
    Measure("energy/joules_total", "energy so far", "J", "Since the run began.", "lower"),
    Measure("clients/trained", "clients", "clients", "Clients that trained."),
    Measure("clients/steps", "local steps", "steps", "Local steps of all of them."),
    Measure("clients/samples", "samples", "samples", "Training samples of those whose updates count."),
    Measure("clients/kept_bytes", "kept by clients", "bytes",
            "What all clients together keep between their visits; it never travels.",
            when="methods whose clients keep state"),
    Measure("clients/refused", "refused", "clients",
            "Clients whose update was refused, or that failed.", "lower"),
    Measure("clients/refused_list", "refused clients", "", "Which ones and why, a list of pairs."),
    Measure("clients/unavailable", "unavailable", "clients", "Clients asked that were not there."),
    Measure("clients/stragglers", "stragglers", "clients",
            "Clients not asked because even an empty upload would be late."),
    Measure("clients/dropped", "dropped out", "clients", "Clients that got the model and never answered."),
    Measure("clients/late", "late", "clients", "Clients whose update came too late and is left out."),
    Measure("clients/in_flight", "in flight", "clients",
            "Clients that still train after the step.", when="schedule.name=buffered"),
    Measure("clients/staleness", "staleness", "steps",
            "Mean number of server steps that updates are behind.", when="schedule.name=buffered"),
    Measure("clients/staleness_max", "largest staleness", "steps",
            "The largest of them.", when="schedule.name=buffered"),
    Measure("time/simulated_s", "simulated time", "s",
            "On the devices' clock since the run began.", "lower"),
    Measure("time/round_simulated_s", "simulated time of a round", "s", "On the devices' clock.", "lower"),
    Measure("time/round_s", "time of a round", "s",
            "Wall-clock seconds of the round, as all that follow.", "lower"),
    Measure("time/prepare_s", "preparing", "s", "Draw the cohort, encode the broadcast."),
    Measure("time/work_s", "clients' work", "s", "Until the last client was played.", when="execution=ray"),
    Measure("time/merge_s", "merging", "s", "From then until the total was there.", when="execution=ray"),
    Measure("time/evaluate_s", "evaluation", "s", "Evaluation in this process.", when="execution=inline"),
    Measure("time/step_s", "server step", "s", "Aggregate and advance the server's state."),
    Measure("time/log_s", "logging", "s", "Measuring and writing the line of the round before."),
    Measure("time/checkpoint_s", "checkpointing", "s",
            "Writing the checkpoint of the round before, if any."),
    Measure("time/clients_train_s", "training by all clients", "s", "Seconds of all clients, added up."),
    Measure("time/clients_encode_s", "encoding by all clients", "s", "Seconds of all clients, added up."),
    Measure("time/clients_decode_s", "decoding of all clients", "s", "Seconds of all clients, added up."),
    Measure("time/clients_fold_s", "folding of all clients", "s", "Seconds of all clients, added up."),
    Measure("time/clients_evaluate_s", "evaluation by all actors", "s", "Seconds of all chunks, added up."),
    Measure("time/actors", "actors", "", "Clients played at once."),
    Measure("time/lost_actors", "lost actors", "", "Actors that died or hung in the round.", "lower"),
    Measure("shift/period", "period", "", "How many shifts of the data lie behind.", when="shift.round"),
    Measure("shift/recovery_rounds", "rounds to recover", "rounds",
            "Rounds on the new data until what selects was as good on test data as before; null until"
            " then.", "lower", when="after a shift"),
    Measure("privacy/epsilon", "epsilon", "",
            "What all models so far tell of one client at most, at privacy.dp.delta; null: anything.",
            "lower", when="privacy.dp"),
    Measure("privacy/clip", "clip", "", "What the round's updates were cut to.", when="privacy.dp"),
    Measure("privacy/clipped", "clipped updates", "share",
            "Share of the round's updates that were cut.", when="privacy.dp"),
    Measure("method/<name>", "a method's own", "",
            "A number that the method measures, by the name it gives.",
            when="methods with measures of their own"),
    Measure("<name>/layers", "a method's own of layers", "",
            "A number that the method measures of each prunable layer, a list; exponent of SparsyFed.",
            when="methods with measures of their own"),
)  # fmt: skip

#: What ``result.json`` holds whatever is learned.
RESULTS: tuple[Measure, ...] = (
    Measure("method", "method", "", "algorithm.name."),
    Measure("seed", "seed", "", "The run's seed."),
    Measure("rounds", "rounds", "rounds", "Rounds computed."),
    Measure("complete", "complete", "", "Whether all planned rounds are, or ``stop`` has ended the run."),
    Measure("stopped_by", "stopped by", "", "What ``stop`` ended the run for; null where it did not."),
    Measure("best_round", "best round", "", "The first round with the best value of what selects."),
    Measure("selected_by", "selected by", "",
            "What the best round is chosen by, as in a line: on validation data where some is held out."),
    Measure("objective", "objective", "", "objective.name, and its metrics: key, title, unit, better ..."),
    Measure("sparsity", "sparsity", "share", "sparsity/global after the last round."),
    Measure("uplink_bytes", "sent up", "bytes", "comm/uplink_bytes_total.", "lower"),
    Measure("downlink_bytes", "sent down", "bytes", "comm/downlink_bytes_total.", "lower"),
    Measure("flops_dense", "dense training cost", "FLOP", "flops/dense_total.", "lower"),
    Measure("flops_sparse", "training cost", "FLOP", "flops/sparse_total.", "lower", version=2),
    Measure("simulated_s", "simulated time", "s", "time/simulated_s.", "lower"),
    Measure("joules", "energy", "J",
            "energy/joules_total; null where an older version began the run.", "lower"),
    Measure("seconds", "time", "s", "Wall-clock seconds of the run, since it was last resumed.", "lower"),
    Measure("config_hash", "configuration", "", "Hash of every key that can change a result."),
    Measure("code_hash", "code", "", "Hash of the packages' source."),
    Measure("partition_hash", "partition", "", "Hash of who has which samples."),
    Measure("measures", "versions", "", "Version of the rule of each measure whose rule has changed."),
    Measure("torch", "torch", "", "Version of torch."),
    Measure("cpu_capability", "instruction set", "", "Vector instructions that torch uses."),
    Measure("mlflow_run_id", "MLflow run", "", "Id of the run in MLflow.", when="tracking"),
    Measure("tracking_delivered", "delivered", "",
            "Whether MLflow, and what else is tracked to, has everything.", when="tracking"),
    Measure("checkpoint_uri_behind", "shared storage behind", "",
            "True where shared storage lacks the end.", when="checkpoint_uri, where it cannot be reached"),
)  # fmt: skip

#: Versions of measures whose rule has changed.
VERSIONS = {measure.key: measure.version for measure in MEASURES if measure.version > 1}

_AFTER = {"": "the global model", "_after": "what each client makes of it by local training"}


def of_objective(metrics: Sequence[Measure]) -> Iterator[Measure]:
    """What a line holds of an objective: its metrics, and what is measured of the first, which selects."""
    for split, title in (("test", "test"), ("val", "validation")):
        when = "data.validation" if split == "val" else "evaluate_on=test"
        for metric in metrics:
            yield replace(metric, key=f"{split}/{metric.key}", title=f"{title} {metric.title}",
                          meaning=f"On {title} data: {lowered(metric.meaning)}", when=when)  # fmt: skip
    for split, title in (("test", "test"), ("val", "validation"), ("train", "training")):
        for metric in metrics:
            yield replace(metric, key=f"{split}/robust_{metric.key}", title=f"robust {title} {metric.title}",
                          meaning=f"Under attack, on {title} data: {lowered(metric.meaning)}",
                          when="evaluate_attack.every")  # fmt: skip
    yield replace(metrics[0], key="robust_gap", title=f"robust gap in {metrics[0].title}", better="lower",
                  meaning="Under attack: by how much it is better on training than on test data (validation "
                  "data where none is tested).", when="evaluate_attack.every")  # fmt: skip
    selects = metrics[0]
    key, title, spread = selects.key, selects.title, replace(selects, better=None)
    yield replace(selects, key=f"tiers/<tier>/{key}", title=f"{title} of a tier",
                  meaning="Of the global model, cut to the tier's budget, on test data.",
                  when="devices.tiers with a sparsity")  # fmt: skip
    for suffix, model in _AFTER.items():
        when = "evaluate_clients.after" if suffix else "evaluate_clients.every"
        for what, words, form, meaning in (
            (
                "mean",
                "clients' mean",
                selects,
                "Mean over clients, each on its own mix of classes (or own rows), of {}.",
            ),
            ("std", "spread of", spread, "Standard deviation over the clients of the same, of {}."),
            ("worst_decile", "worst decile of", selects, "Mean over the tenth that is served worst, of {}."),
        ):
            yield replace(form, key=f"clients/{key}_{what}{suffix}", when=when, meaning=meaning.format(model),
                          title=f"{words} {title}" + " after local training" * bool(suffix))  # fmt: skip
    yield replace(selects, key=f"clients/{key}_gain", title=f"gain in {title} by local training",
                  meaning="Mean over the clients of the difference that local training makes.",
                  when="evaluate_clients.after")  # fmt: skip
    for what, form, meaning in (
        ("mean", selects, "Mean over clients that never train, on rows of their own, of {}."),
        ("std", spread, "Standard deviation over them of the same, of {}."),
        ("worst_decile", selects, "Mean over the tenth of them that is served worst, of {}."),
    ):
        for suffix, model in (
            ("", "the global model"),
            ("_<K>_shot", "what K rows of each class make of it"),
        ):
            yield replace(form, key=f"unseen/{key}_{what}{suffix}", meaning=meaning.format(model),
                          title=f"{what.replace('_', ' ')} {title} of new clients" + suffix.replace("_", " "),
                          when="evaluate_clients.unseen")  # fmt: skip
    for what, meaning in (("mean", "Mean over the groups"), ("worst", "The worst of the groups")):
        yield replace(selects, key=f"groups/{key}_{what}", title=f"{what} {title} of groups",
                      meaning=f"{meaning} of `data.group_column`, on validation data.",
                      when="evaluate_clients.groups")  # fmt: skip
    yield replace(spread, key=f"shift/{key}_before", title=f"test {title} before the shift",
                  meaning="On test data, at the last evaluation before the last shift.",
                  when="after a shift")  # fmt: skip
    yield replace(selects, key=f"shift/{key}_change", title=f"change of test {title} since the shift",
                  meaning="On test data, from there to this round.", when="after a shift")  # fmt: skip


def lowered(sentence: str) -> str:
    """A sentence as it goes on after a colon."""
    return sentence[:1].lower() + sentence[1:]


def results_of(selects: Measure) -> Iterator[Measure]:
    """What a result holds of what selects."""
    key, title = selects.key, selects.title
    yield replace(selects, title=f"test {title}", meaning="On test data, after the last round.")
    yield replace(selects, key=f"best_{key}", title=f"best test {title}",
                  meaning="On test data, of the best round.")  # fmt: skip
    yield replace(selects, key=f"val_{key}", title=f"validation {title}",
                  meaning="On validation data, after the last round.")  # fmt: skip


def declared(key: str, metrics: Sequence[Measure]) -> Measure | None:
    """The measure that a line's key is declared as; None for a key that is not.

    Args:
        key: As in a line.
        metrics: Those of the objective.
    """
    for measure in (*of_objective(metrics), *MEASURES):
        pattern = re.sub(r"<\w+>", "[^/]+", re.escape(measure.key).replace(r"\<", "<").replace(r"\>", ">"))
        if re.fullmatch(pattern, key):
            return measure
    return None


def as_values(metrics: Iterable[Measure]) -> list[dict[str, Any]]:
    """Metrics as a result or a tag holds them."""
    return [asdict(metric) for metric in metrics]


def from_values(values: Iterable[Mapping[str, Any]]) -> tuple[Measure, ...]:
    """The metrics that :func:`as_values` wrote; keys of another version fall away."""
    known = Measure.__dataclass_fields__
    return tuple(Measure(**{key: own for key, own in each.items() if key in known}) for each in values)
