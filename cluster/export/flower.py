"""A complete app of Flower (pyproject, ServerApp, ClientApp) that computes the rounds of a run again.

Its server is this project's driver with an engine that asks nodes, its clients are this project's: see
:mod:`cluster.export.flower_app`, whose files are the app's.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from algorithms import Algorithm
from cluster import __version__, seeding
from cluster.configuration.config import Config, validate
from cluster.configuration.trees import stored_text
from cluster.export.finished import ExportError, Finished, local_file
from cluster.federation import Federation
from cluster.records.introduction import facts, run_name
from cluster.records.run_folder import check_free

#: The version that the app was tried with.
FLOWER = "1.42.0"

_FILES = ("__init__.py", "rounds.py", "server_app.py", "client_app.py")

_PYPROJECT = f"""\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "sparsyfed-app"
version = "1.0.0"
description = "%(name)s as an app of Flower"
# sparsyfed {__version__} is to be installed beside it: Flower would fetch what is listed here from an index.
dependencies = ["flwr=={FLOWER}"]

[tool.hatch.build.targets.wheel]
packages = ["sparsyfed_app"]

[tool.flwr.app]
publisher = "sparsyfed"

[tool.flwr.app.components]
serverapp = "sparsyfed_app.server_app:app"
clientapp = "sparsyfed_app.client_app:app"

[tool.flwr.app.config]
output = "runs/flower"   # the run's folder, where the ServerApp is; one of this experiment is resumed
nodes = 2                # how many SuperNodes to wait for
"""

_README = """\
# %(name)s as an app of Flower

%(facts)s

The server is sparsyfed's driver, the clients are sparsyfed's: a round's model and updates travel in its own
wire format, as bytes in a `ConfigRecord`, and the run ends in the same weights, bit for bit, whichever node
plays whom. Every node decodes the data set (`sparsyfed_app/experiment.yaml`, section `data`) on its own
machine and plays the clients that the server names. sparsyfed of one and the same code has to be installed
wherever the app runs; a node with other code says so.

    pip install flwr==%(flower)s      # not its extra `simulation`, which pins an older Ray than sparsyfed's

In Flower's simulation, on two nodes:

    flwr run . --stream --run-config 'output="/tmp/flower-run"'

On machines of your own, with TLS in place of `--insecure`:

    flower-superlink --insecure --host 0.0.0.0
    flower-supernode --insecure --superlink HOST:8000 --port 9094     # on each, with a port of its own
    flwr run . CONNECTION --stream --run-config 'output="/tmp/flower-run" nodes=2'

`CONNECTION` is a section `[superlink.CONNECTION]` with `address` and `insecure` in `~/.flwr/config.toml`.
`output` is then a run's folder of sparsyfed, on the machine of the server: `sparsyfed compare` reads it, and
the same `flwr run` goes on where an interrupted one left it.
"""


def write(finished: Finished, output: Path) -> str:
    """Write the app; says how it is run.

    Args:
        finished: The run.
        output: A new or empty folder.

    Raises:
        ExportError: Flower cannot run it with the same result; says why.
    """
    config = finished.config
    if (reason := refusal(config)) is not None:
        raise ExportError(f"{finished.folder.path} cannot be an app of Flower: {reason}")
    check_free(output)
    package = output / "sparsyfed_app"
    package.mkdir(parents=True)
    for name in _FILES:
        shutil.copyfile(Path(__file__).parent / "flower_app" / name, package / name)
    (package / "experiment.yaml").write_bytes(stored_text(portable(config).resolved()))
    told = {"flower": FLOWER, "name": run_name(config), "facts": "  \n".join(facts(config))}
    (output / "pyproject.toml").write_text(_PYPROJECT % told, encoding="utf-8")
    (output / "README.md").write_text(_README % told, encoding="utf-8")
    return f"run       flwr run {shlex.quote(str(output))} --stream"


def portable(config: Config) -> Config:
    """The same experiment without what belongs to this machine or to Ray; its hash is the same."""
    tree = config.dump()
    tree |= {"execution": "inline", "address": "local", "detached": False, "checkpoint_uri": None}
    tree["tracking"], tree["data"]["cache"] = {"enabled": False}, None
    return validate(tree)


def refusal(config: Config) -> str | None:
    """Why an experiment cannot run on nodes of Flower with the same result; None where it can."""
    name = config.algorithm.name
    if config.references:
        key, reference = next(iter(config.references.items()))
        return f"{key} = {reference} is code of your own, which the app does not carry"
    if (local := local_file({"weights": config.model.weights, **config.model.options})) is not None:
        return f"{local} lies on this machine, and the app does not carry it"
    if config.schedule.name != "synchronous":
        return (
            f"schedule.name = {config.schedule.name}: who arrives when follows from the simulated clock, and "
            "Flower's rounds are synchronous"
        )
    if config.wire.bits is not None:
        return (
            f"wire.grid = {config.wire.bits}: its words count in the round's units, which nodes do not know"
        )
    if config.privacy.secure.asked:
        return "privacy.secure: the keys of a secure round are simulated, and do not travel to nodes"
    federation = Federation.of(config)
    method, layout = config.method, federation.layout
    if method.keeps(layout):
        return f"clients of {name} keep {', '.join(method.keeps(layout))} between visits; nodes keep nothing"
    state = method.initial_state(federation.initial_weights, layout, seeding.generator(config.seed, "server"))
    if state.mask is not None or type(method).next_mask is not Algorithm.next_mask:
        return f"server and clients of {name} hold a mask between rounds; nodes keep nothing"
    if method.first_round < 1:
        return f"{name} begins with a stage of its own before round 1; nodes play rounds alone"
    if any(federation.part_of(tier) is not None for tier in config.devices.kinds):
        return f"{name} sends clients parts of the model, by their device's budget; nodes get all of it"
    return None
