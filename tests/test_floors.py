"""Who may lean on whom: imports go down, and files form no circle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: From the ground to the roof, rooms side by side in one line. A room imports only what stands below it.
FLOORS = (
    "algorithms.core",
    "algorithms",
    "cluster",  # its version; the public names are loaded when they are asked for
    "cluster.references",
    "cluster.disk cluster.logins cluster.machine cluster.seeding cluster.statistics cluster.flops "
    "cluster.measures cluster.accounting",
    "cluster.configuration",
    "cluster.workload cluster.transport cluster.simulation",
    "cluster.measured cluster.trained_model cluster.guarantee",
    "cluster.exchange",
    "cluster.federation",
    "cluster.clients cluster.records",
    "cluster.rounds",
    "cluster.actors",
    "cluster.execution",
    "cluster.grid cluster.export",
    "cluster.compare",
    "cluster.command_line",
    "tuning",
    "cluster.cli",
    "cluster.__main__",
)
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms.split()}


def room_of(module: str) -> str:
    """``cluster.rounds.driver`` is in ``cluster.rounds``, ``algorithms.topk`` in ``algorithms``."""
    return module if module in HEIGHT else room_of(module.rpartition(".")[0])


def files(*packages: str) -> dict[str, Path]:
    """The files of some packages by module name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in packages
        for path in (ROOT / package).rglob("*.py")
    }


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The project's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from [name for name in (whole, node.module) if name in known][:1]


def arrows() -> dict[str, set[str]]:
    """What every file of the product imports of it."""
    known = files("algorithms", "cluster", "tuning")
    return {module: set(imports(path, known)) for module, path in known.items()}


def test_a_room_imports_only_what_stands_below_it() -> None:
    """Sideways is allowed to nobody, so that rooms of one floor could trade places."""
    back = [
        f"{module} -> {other}"
        for module, others in arrows().items()
        for other in sorted(others)
        if (here := room_of(module)) != (there := room_of(other)) and HEIGHT[there] >= HEIGHT[here]
    ]
    assert not back, "\n".join(back)


def test_files_form_no_circle() -> None:
    """A file can be read with what it imports, and that ends."""
    TopologicalSorter(arrows()).prepare()


@pytest.mark.parametrize("room", sorted(HEIGHT))
def test_every_floor_is_there(room: str) -> None:
    """A name on no floor would be a floor that nobody minds."""
    path = ROOT.joinpath(*room.split("."))
    assert path.is_dir() or path.with_suffix(".py").is_file()
