"""Every ``*.name`` by one mechanism: its fields alone, described, replaced as a whole, or one's own."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch import nn

import cluster
from algorithms import hyperparameter, hyperparameters
from cluster.cli import main
from cluster.configuration.choices import KINDS, build_choice, built_in, choice_base, names
from cluster.configuration.config import resolve, validate
from cluster.configuration.trees import ConfigError, apply_overrides, read_stored, stored_text
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.references import UserError
from cluster.rounds.schedules import Synchronous, Timing
from cluster.rounds.synchronous import Synchronous as SynchronousRounds
from cluster.simulation.availability import Availability
from cluster.simulation.clock import DeviceError
from cluster.simulation.devices import Devices
from cluster.simulation.samplers import Sampler
from cluster.workload.architecture import Architecture
from cluster.workload.partitioners import Partitioner, PartitionError
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

BUILT_IN = [(section, name) for section in KINDS for name in (names(section) if KINDS[section].base else ())]


def message(*overrides):
    with pytest.raises(ConfigError) as refused:
        resolve("quickstart", overrides)
    return str(refused.value)


# ------------------------------------------------------------------------------------------ what there is


@pytest.mark.parametrize(("section", "name"), BUILT_IN)
def test_a_built_in_choice_is_declared_and_described(section, name, capsys):
    choice = built_in(section)[name]
    assert issubclass(choice, choice_base(section))
    options = {"path": "x.csv"} if name == "trace" else {}
    assert type(build_choice(section, name, options)) is choice
    assert main(["describe", section, name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{name}\n")
    rows = [row.split() for row in shown.splitlines()]
    for field in hyperparameters(choice):
        assert any(row[:1] == [field.name] for row in rows), field.name
        assert field.meaning
    for key in KINDS[section].shared:
        assert any(row[:1] == [key] for row in rows), key
    assert main(["describe", section]) == 0
    assert any(row.split()[:1] == [name] for row in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["partitoin", "lda"], "'partitoin' is no section with choices; .* did you mean partition?"),
        (["partition", "ldaa"], "describe partition: 'ldaa' is unknown; .* did you mean lda?"),
        (["samplr"], "neither a section .* nor a folder; did you mean sampler?"),
        (["spasyfed"], "did you mean sparsyfed?"),
        (["sampler", "json:nothing"], "module 'json' has no 'nothing'"),
    ],
)
def test_describe_of_what_is_not_there_names_the_nearest(words, says, capsys):
    assert main(["describe", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    first, _, last = says.partition(" .* ")
    assert first in line
    assert last in line


# ------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["partition.name=iid", "partition.alpha=2"],
            "partition.alpha: iid has no such field; its fields: none, and of every partition clients, seed; "
            "alpha belongs to lda, dirichlet, sampled",
        ),
        (
            ["partition.shards_per_client=3"],
            "partition.shards_per_client: lda has no such field; its fields: alpha, order, and of every "
            "partition clients, seed; shards_per_client belongs to shards",
        ),
        (["partition.cleints=3"], "did you mean clients?"),
        (
            ["partition.shard_per_client=3"],
            "did you mean shards_per_client? shards_per_client belongs",
        ),
        (["schedule.concurency=3"], "did you mean concurrency? concurrency belongs to buffered"),
        (
            ["sampler.name=size", "sampler.power=2"],
            "sampler.power: size has no such field; its fields: none; see sparsyfed describe sampler",
        ),
        (["sampler.name=xyz"], "or module:attribute of your own; see sparsyfed describe sampler"),
        (["server.tau=0.1"], "its fields: lr, momentum; tau belongs to fedadagrad, fedadam, fedyogi"),
        (["model.width=3"], "model.width: small_cnn has no such field; .*; width belongs to resnet18"),
        (["model.channels=[4,0]"], "model.channels: 0 is out of range"),
        (["model.channels=3"], "model.channels: expected a list of whole numbers, found 3"),
        (["model.channels=[3]"], "model: channels: two numbers are needed, found [3]"),
        (["model.name=resnet81"], "model.name: 'resnet81' is unknown; .* did you mean resnet18?"),
        (["partition.alpha=null"], "partition.alpha: expected float, found null"),
        (["partition.alpha=.inf"], "partition.alpha: inf is out of range; allowed: a finite number above 0"),
        (["schedule.name=bufferd"], "schedule.name: 'bufferd' is unknown; .* did you mean buffered?"),
        (
            ["devices.profile=phones", "devices.tiers.mid.availability={name: diurnal, hihg: 1}"],
            "devices.tiers.mid.availability.hihg: diurnal has no such field; .* did you mean high?",
        ),
        (
            ["devices.profile=phones", "devices.tiers.mid.availability=dirunal"],
            "devices.tiers.mid.availability.name: 'dirunal' is unknown; .* did you mean diurnal?",
        ),
        (
            ["shift.round=2", "shift.partition={name: shards, alpha: 1}"],
            "shift.partition.alpha: shards has no such field; .* alpha belongs to lda",
        ),
    ],
)
def test_a_key_that_the_choice_does_not_have_is_one_line(overrides, says):
    found = message(*overrides)
    assert "\n" not in found
    first, _, last = says.partition(" .* ") if " .* " in says else says.partition(" .*; ")
    assert first in found
    assert last in found


def test_another_name_takes_the_fields_along():
    tree = resolve(
        "quickstart", ["partition.alpha=2", "schedule.deadline=9", "devices.profile=phones"]
    ).dump()
    again = apply_overrides(tree, ["partition.name=shards", "schedule.name=buffered", "sampler.name=size"])
    again = apply_overrides(again, ["algorithm.name=topk", "schedule.buffer=2", "schedule.concurrency=4"])
    again = apply_overrides(again, ["devices.tiers.mid.availability.name=always"])
    config = validate(again)
    assert config.partition.options == {"shards_per_client": 2}
    assert config.partition.clients == 30
    assert config.schedule.options["buffer"] == 2
    assert "deadline" not in config.schedule.options
    assert config.devices.tiers["mid"].availability.options == {}
    assert config.devices.tiers["low"].availability.options["high"] == 0.8


def test_a_key_of_a_profiles_availability_changes_that_key_alone():
    config = resolve("quickstart", ["devices.profile=phones", "devices.tiers.mid.availability.low=0.3"])
    mid = config.devices.tiers["mid"].availability
    assert (mid.name, mid.options["low"], mid.options["high"]) == ("diurnal", 0.3, 0.8)
    always = resolve("quickstart", ["devices.profile=phones", "devices.tiers.mid.availability=always"])
    assert always.devices.tiers["mid"].availability.options == {}
    assert validate(always.dump()) == always


def test_the_keys_of_a_choice_are_filled_in_and_hashed():
    config = resolve("quickstart", ["partition.name=sampled"])
    assert config.resolved()["partition"] == {
        "name": "sampled", "clients": 30, "seed": 1337, "alpha": 1.0, "samples_per_client": 50,
    }  # fmt: skip
    spelt_out = resolve("quickstart", ["partition.name=sampled", "partition.samples_per_client=50"])
    assert spelt_out.digest() == config.digest()
    other = resolve("quickstart", ["partition.name=sampled", "partition.samples_per_client=51"])
    assert other.digest() != config.digest()
    assert "partition.shards_per_client" not in config.flat()


def test_a_path_is_text_and_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve(
        "quickstart",
        ["devices.tiers={a: {share: 1, availability: {name: trace, path: 1e3}}}"],
    )
    assert config.devices.tiers["a"].availability.options == {"path": str(tmp_path / "1e3")}


# --------------------------------------------------------------------------------------- older folders


def test_keys_of_another_choice_fall_away_in_a_stored_configuration_alone(tmp_path):
    tree = resolve("quickstart", ["partition.name=iid", "shift.round=9"]).dump()
    tree["partition"]["alpha"] = 0.5
    tree["schedule"] |= {"staleness_exponent": 0.7, "buffer": None}
    tree["shift"]["partition"] = {"shards_per_client": 4, "seed": 2}
    file = tmp_path / "config.yaml"
    file.write_bytes(stored_text(tree))
    stored = read_stored(file)
    assert stored.pop("earlier") == {
        "partition.alpha": 0.5, "schedule.staleness_exponent": 0.7, "shift.partition.shards_per_client": 4,
    }  # fmt: skip
    assert stored["partition"] == {"name": "iid", "clients": 30, "seed": 1337}
    assert stored["shift"]["partition"] == {"seed": 2}
    config = RunFolder.open(tmp_path).config()
    now = resolve("quickstart", ["partition.name=iid", "shift.round=9", "shift.partition={seed: 2}"])
    assert config.flat() == now.flat()
    # What was typed nevertheless is still in the hash, whatever becomes of the folder.
    assert config.digest() == "271740fe7aff"
    again = validate(apply_overrides(config.dump(), ["actors=3"]))
    file.write_bytes(stored_text(again.resolved()))
    assert RunFolder.open(tmp_path).config().digest() == config.digest() != now.digest()
    with pytest.raises(ConfigError, match=r"partition.alpha: iid has no such field"):
        resolve({"partition": {"name": "iid", "alpha": 0.5}})  # what is typed


# --------------------------------------------------------------------------------------------- one's own


@dataclass(frozen=True, kw_only=True)
class Blocks(Partitioner):
    """One block of samples after the other."""

    skip: int = hyperparameter(0, "samples at the start that nobody gets", low=0)

    def owners(self, labels, clients, rng, groups):
        """In the order of the data."""
        owner = np.arange(len(labels)) * clients // len(labels)
        return np.where(np.arange(len(labels)) < self.skip, -1, owner)


@dataclass(frozen=True, kw_only=True)
class Wrong(Partitioner):
    """Owners that are none."""

    how: str = hyperparameter("short", "what is wrong", choices=("short", "beyond", "empty", "floats"))

    def owners(self, labels, clients, rng, groups):
        """What ``how`` says."""
        owner = np.arange(len(labels)) % clients
        return {
            "short": owner[1:], "beyond": owner + 1, "empty": np.maximum(owner, 1), "floats": owner / 1,
        }[self.how]  # fmt: skip


class Nothing(Partitioner):
    """Neither owners nor divide."""


@dataclass(frozen=True, kw_only=True)
class Last(Sampler):
    """The last clients."""

    before: int = hyperparameter(0, "clients behind them", low=0)

    def __call__(self, rng, count, candidates):
        """See Sampler."""
        return candidates.clients - self.before - 1 - np.arange(count)


class Unfinished(Sampler):
    """A sampler that does not sample."""


@dataclass(frozen=True, kw_only=True)
class Odd(Availability):
    """Odd clients, or an answer that is none."""

    kind: str = hyperparameter("bool", "type of the answer")

    def available(self, seed, clients, simulated_s):
        """See Availability."""
        return (clients % 2).astype(self.kind)


class CountedRounds(SynchronousRounds):
    """Synchronous rounds that count themselves."""

    seen: list = []  # noqa: RUF012

    def round(self, state, chunks, meanwhile):
        """See Schedule."""
        self.seen.append(self.timing.label)
        return super().round(state, chunks, meanwhile)


@dataclass(frozen=True, kw_only=True)
class Counted(Synchronous):
    """Rounds that are counted."""

    runs = CountedRounds
    label: str = hyperparameter("a", "what is noted")


class NoSchedule(Timing):
    """Runs what is no schedule."""

    runs = dict


@dataclass(frozen=True, kw_only=True)
class Line(Architecture):
    """A linear classifier."""

    bias: bool = hyperparameter(True, "whether it has one")

    def build(self, input_shape, classes):
        """See Architecture."""
        return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(input_shape)), classes, bias=self.bias))


def raising(**_):
    """A factory with a mistake inside."""
    raise ValueError("inside the user's own code")


def test_choices_of_ones_own_play_a_run(cache, tmp_path):
    CountedRounds.seen.clear()
    config = tiny_federation(
        cache,
        partition={"name": f"{__name__}:Blocks", "skip": 6},
        sampler={"name": f"{__name__}:Last", "before": 1},
        model={"name": f"{__name__}:Line", "bias": False},
        schedule={"name": f"{__name__}:Counted", "label": "mine"},
        devices={"tiers": {"a": {"share": 1.0, "availability": {"name": f"{__name__}:Odd"}}}},
        cohort=4,
    )
    assert config.references.keys() == {
        "partition.name", "sampler.name", "model.name", "schedule.name", "data.name",
        "devices.tiers.a.availability.name",
    }  # fmt: skip
    assert config.resolved()["sampler"] == {"name": f"{__name__}:Last", "before": 1}
    federation = Federation.of(config)
    # 120 samples in six blocks of 20, of the first of which 6 are skipped.
    assert federation.partition.sizes.tolist() == [14, 20, 20, 20, 20, 20]
    assert federation.partition.client(0).tolist() == list(range(6, 20))
    assert [tuple(p.shape) for p in federation.model.parameters()] == [(3, 64)]
    run = run_inline(config, tmp_path / "run")
    assert CountedRounds.seen == ["mine", "mine"]
    # Asked are the clients 1 to 4, of which the odd ones are there.
    assert {client for _, client in run.uploads} == {1, 3}
    assert RunFolder.open(tmp_path / "run").config().resolved() == config.resolved()
    assert cluster.resolve(config.dump()) == config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": f"{__name__}:Nothing"}, "Nothing has neither `owners` nor `divide` of its own"),
        ({"name": f"{__name__}:Wrong"}, r"owners of Wrong returned int64 \[119\]; expected .* int64 \[120\]"),
        ({"name": f"{__name__}:Wrong", "how": "floats"}, r"returned float64 \[120\]"),
        ({"name": f"{__name__}:Wrong", "how": "beyond"}, "to clients 1 to 6; there are 0 to 5"),
        ({"name": f"{__name__}:Wrong", "how": "empty"}, "leaves client 0 without a sample"),
    ],
)
def test_owners_that_are_none_are_refused(cache, options, says):
    with pytest.raises(PartitionError, match=says):
        Federation.of(tiny_federation(cache, partition=options))


def test_an_answer_about_availability_is_a_bool_a_client(cache):
    tiers = {"a": {"share": 1.0, "availability": {"name": f"{__name__}:Odd", "kind": "int64"}}}
    config = tiny_federation(cache, devices={"tiers": tiers})
    with pytest.raises(DeviceError, match=r"Odd returned int64 \[2\]; expected bool \[2\]"):
        Devices(config).available(np.array([2, 3]), 0.0)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sampler.name={}:Unfinished", "sampler.name = '{}:Unfinished': it lacks __call__"),
        ("partition.name={}:Last", "expected a subclass of Partitioner, found a class of its own"),
        ("partition.name={}:raising", "expected a subclass of Partitioner, found function"),
        ("schedule.name={}:Blocks", "expected a subclass of Timing"),
        ("model.name={}:HERE", "module '{}' has no 'HERE'"),
        ("model.name=math:pi", "model.name = 'math:pi': 3.14"),
    ],
)
def test_code_of_ones_own_that_is_no_choice_is_one_line(override, says):
    found = message(override.format(__name__))
    assert "\n" not in found
    assert says.format(__name__) in found


def test_a_timing_that_runs_no_schedule_is_refused(cache, tmp_path):
    config = tiny_federation(cache, schedule={"name": f"{__name__}:NoSchedule"})
    with pytest.raises(UserError, match="it runs dict, which is no subclass of Schedule"):
        run_inline(config, tmp_path / "run")


def test_what_ones_own_code_raises_keeps_its_type():
    with pytest.raises(ValueError, match=r"^inside the user's own code$") as raised:
        resolve("quickstart", [f"sampler.name={__name__}:raising"])
    assert not isinstance(raised.value, ConfigError)
    assert Path(raised.traceback[-1].path).name == "test_choices.py"


def test_the_written_config_holds_the_keys_of_the_choice(tmp_path):
    RunFolder.create(tmp_path / "run", resolve("quickstart", ["partition.name=iid"]))
    tree = yaml.safe_load((tmp_path / "run" / "config.yaml").read_bytes())
    assert tree["partition"] == {"name": "iid", "clients": 30, "seed": 1337}
    assert tree["schedule"] == {"name": "synchronous", "over_selection": 1.0, "deadline": None}
