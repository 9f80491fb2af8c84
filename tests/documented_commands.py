"""The commands that a page shows, and whether their programs would take them; nothing is run."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
from ray.scripts.scripts import cli as ray_command

from cluster.command_line.arguments import parse
from cluster.command_line.describe_choice import choice_asked
from cluster.configuration.choices import choice_named
from cluster.configuration.config import resolve
from cluster.configuration.identity import changes_results
from cluster.configuration.trees import load_tree
from cluster.grid import expand
from tests.benchmarks.__main__ import BENCHMARKS
from tuning.study import load_plan

ROOT = Path(__file__).parents[1]

#: What the pages leave to the reader, and what stands for it here.
STAND_INS = {
    "my_experiment.yaml": "quickstart",
    "my_study.yaml": "study-digits",
    "my_module:RandomK": "tests.example_method:RandomK",
    "my_partition:Halves": "tests.example_partition:Halves",
    "fedsparsify:FedSparsify": "tests.example_fedsparsify:FedSparsify",
}

#: Programs of others, whose arguments are not looked at.
_OTHERS = {
    "cd",
    "docker",
    "export",
    "git",
    "kubectl",
    "mkdocs",
    "mypy",
    "optuna-dashboard",
    "tensorboard",
    "wandb",
    "pre-commit",
    "pip",
    "pytest",
    "python3",
    "ruff",
    "source",
}


def text_of(page: Path) -> str:
    """A page's Markdown; of a notebook what its cells say, code in blocks."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(f"```python\n{code}\n```" if kind == "code" else code for kind, code in cells)


def commands(page: Path) -> Iterator[list[str]]:
    """Every command of a page in words, without comments and variables set in front of it.

    Commands are the lines of bash blocks, and indented lines and text between backticks that begin with
    ``sparsyfed`` or ``python -m``.
    """
    text = text_of(page)
    fenced = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\\\n", " ")
    begin = r"(?:[A-Z_]+=\S+ )*(?:sparsyfed [a-z-]|python -m )"
    indented = re.findall(rf"^    ({begin}.*)$", rest, re.MULTILINE)
    inline = [" ".join(span.split()) for span in re.findall(rf"`({begin}[^`]*)`", rest)]
    for block in (*fenced, *indented, *inline):
        for line in block.replace("\\\n", " ").splitlines():
            # $(...) stays one word.
            words = shlex.split(re.sub(r"\$\((.*?)\)", lambda m: shlex.quote(m[0]), line), comments=True)
            while "&&" in words:
                yield _without_variables(words[: words.index("&&")])
                words = words[words.index("&&") + 1 :]
            if words := _without_variables(words):
                yield words


def _without_variables(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


def take(words: Sequence[str]) -> None:
    """Parse a command as its program would; raises, or ends the process, where that would complain."""
    program, *arguments = words
    for word in words:
        if word.startswith("ray_configs/"):
            assert (ROOT / word).is_file(), word
    behind = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    if program == "ray":
        ray_takes(arguments)
    elif program == "sparsyfed":
        sparsyfed_takes(arguments)
    elif program == "python":
        python_takes(arguments)
    elif program == "uv":
        if arguments[0] == "run":
            take(arguments[1:])
        else:
            assert arguments[0] in ("lock", "sync"), words
    elif program == ".ci/run":
        assert (ROOT / program).is_file()
        assert arguments in ([], ["quick"]), words
    elif program == "sbatch":
        (script,) = (place for place, word in enumerate(arguments) if word.startswith("ray_configs/slurm"))
        sparsyfed_takes([*arguments[script + 1 :], "address=auto"])
    else:
        assert Path(program).name in _OTHERS, words
    if behind[:1] == ["python"]:
        python_takes(behind[1:])
    elif behind and behind[0].startswith("$("):
        script, flag, *rest = shlex.split(behind[0][2:-1])[1:]
        assert ((ROOT / script).is_file(), flag) == (True, "--quote")
        sparsyfed_takes(rest)
    elif behind:
        sparsyfed_takes(behind)


def ray_takes(words: Sequence[str]) -> None:
    """Parse the arguments of ``ray ...`` with Ray's own parser."""
    command = ray_command
    while hasattr(command, "get_command"):
        name, *words = words
        command = command.get_command(None, name)
        assert command is not None, f"ray has no command {name}"
    command.make_context(command.name, list(words))


def sparsyfed_takes(words: Sequence[str]) -> None:
    """Parse the arguments of ``sparsyfed ...``, and resolve the experiment or study that they name."""
    if "--help" in words or len(words) == 1:  # a command alone is named, as in "`sparsyfed resume` asks"
        with pytest.raises(SystemExit, match=r"^0$"):
            parse([words[0], "--help"])
        return
    for shown, stand_in in STAND_INS.items():
        words = [word.replace(shown, stand_in) for word in words]
    arguments = parse(list(words))
    source, overrides = getattr(arguments, "source", None), getattr(arguments, "overrides", [])
    if source is not None and source.isupper():  # a placeholder, as in `sparsyfed tune STUDY`
        assert not overrides, words
    elif arguments.command == "run":
        if expand(source or "quickstart", overrides) is None:
            resolve(source, overrides)
    elif arguments.command == "describe":
        choice = choice_asked(arguments.sources) if source else None
        if choice is None and source is not None and "study" in load_tree(source):
            load_plan(source, overrides)
        elif choice is None and (source is None or expand(source, overrides) is None):
            resolve(source, overrides)
        elif choice is None:
            assert arguments.picture is None, words
        elif choice[1] is not None:
            choice_named(*choice)
    elif arguments.command == "tune" and arguments.report is None:
        load_plan(source, overrides)
    elif arguments.command == "resume":
        assert not any(changes_results(each.partition("=")[0]) for each in overrides), words
    elif arguments.command == "bench":
        assert set(arguments.names) <= set(BENCHMARKS), words


class _Parsed(Exception):
    """The arguments were read: what follows would be the work."""


def python_takes(words: Sequence[str]) -> None:
    """Parse the arguments of ``python -m MODULE ...``: ``cluster``, or one whose ``main`` reads them."""
    flag, name, *arguments = words
    assert flag == "-m", words
    if name == "cluster":
        sparsyfed_takes(arguments)
        return
    main = importlib.import_module("tests.benchmarks.__main__" if name == "tests.benchmarks" else name).main
    read = argparse.ArgumentParser.parse_args

    def read_and_stop(parser: argparse.ArgumentParser, *given: object) -> None:
        read(parser, *given)
        raise _Parsed

    with (
        mock.patch("sys.argv", [name, *arguments]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", read_and_stop),
    ):
        try:
            main()
        except _Parsed:
            return
    raise AssertionError(f"{name} reads no arguments")
