"""Random kills of everything that a run consists of: ``python -m tests.chaos --minutes 10 [--seed 0]``.

Before a release. Each story runs a tiny experiment through the command line, SIGKILLs one of its processes
at a random moment, once or more often, and goes on as its user would. Then it must equal the undisturbed run:
the final model bit by bit, every round's line whole and there once, one run in MLflow with every point once,
every trial of a study complete. A line a story; the exit status is 1 where any of that was violated, and the
folder of that story is kept.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import yaml

from cluster.cli import main as main_of_cluster
from cluster.records.run_folder import RunFolder, comparable

ROOT = Path(__file__).parents[1]
ROUNDS = 6
TINY = {
    "extends": "quickstart",
    "rounds": ROUNDS,
    "cohort": 4,
    "checkpoint_every": 2,
    "model": {"name": "mlp"},
    "partition": {"clients": 8},
    "local": {"epochs": 8},
    "actors": 2,
    "algorithm": {"name": "sparsyfed", "sparsity": 0.9},
}
STUDY = {
    **TINY,
    "rounds": 2,
    "checkpoint_every": 1,
    "execution": "inline",
    "data": {"validation": 0.2},
    "tracking": {"enabled": False},
    "study": {
        "name": "tiny",
        "methods": ["topk", "sparsyfed"],
        "trials": 2,
        "final_seeds": 1,
        "shared": {"local.lr": {"low": 0.05, "high": 0.5, "log": True}},
    },
}
#: Two methods, each with two trials and one final run of two rounds.
STUDY_LINES = 12
#: Seconds after which a command counts as hung.
PATIENCE_S = 600.0


# A command is a fork of a process that has imported everything: seconds less, and otherwise the same.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["cluster.cli", "cluster.execution", "cluster.records.tracking", "tuning.command", "mlflow", "ray"]
)


def _command(words: list[str], root: Path, log: str) -> None:
    os.chdir(root)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    print("$", *words, flush=True)
    sys.exit(main_of_cluster(words))


class Violation(AssertionError):
    """A promise that a story broke."""


class Chaos:
    """Stories below one folder, which share the decoded data and the MLflow store.

    Args:
        root: The folder.
        random: Where the moments come from.
    """

    def __init__(self, root: Path, random: random.Random) -> None:
        self.root, self.random = root, random
        self.kills: Counter[str] = Counter()
        for name, tree in (("tiny", TINY), ("study", STUDY)):
            tree["data"] = {**tree.get("data", {}), "cache": str(root / "cache")}
            (root / f"{name}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")

    # ------------------------------------------------------------------------------------ commands and kills

    def start(self, words: list[str], folder: Path) -> BaseProcess:
        """One command; what it shows is added to ``FOLDER.log``."""
        process = _FORKS.Process(target=_command, args=(words, self.root, f"{folder}.log"))
        process.start()
        return process

    def wait(self, process: BaseProcess) -> int | None:
        """Its exit status."""
        process.join(PATIENCE_S)
        if process.exitcode is None:
            process.kill()
            raise Violation(f"hung for {PATIENCE_S:g} s")
        return process.exitcode

    def after_a_while(self, process: BaseProcess, folder: Path, rounds: int = ROUNDS) -> bool:
        """Wait for a random moment of a command that leads to so many lines; whether it still runs then.

        It is counted in lines, then in seconds, so that it depends little on the speed of the machine.
        """
        written = self._lines(folder)
        wanted = self.random.randint(written - 1, rounds)
        while wanted >= written and self._lines(folder) < wanted and process.exitcode is None:
            process.join(0.02)
        process.join(self.random.uniform(0.0, 1.0 if wanted >= written else 5.0))
        return process.exitcode is None

    def _lines(self, folder: Path) -> int:
        return sum(path.read_bytes().count(b"\n") for path in folder.rglob("rounds.jsonl"))

    def kill(self, process: psutil.Process | BaseProcess, what: str) -> None:
        """SIGKILL."""
        try:
            process.kill()
            self.kills[what] += 1
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass

    def words(self, folder: Path, *overrides: str) -> list[str]:
        """How the tiny run is started."""
        tag = f"tracking.tags.story={folder.name}"
        return ["run", "tiny.yaml", tag, *overrides, "--output", str(folder)]

    def go_on(self, folder: Path, words: list[str]) -> list[str]:
        """What a user types after a crash: resume where there is something, else the same again."""
        return ["resume", str(folder)] if (folder / "config.yaml").exists() else words

    def to_the_end(self, folder: Path, words: list[str]) -> None:
        """Go on until the run is complete."""
        if (RunFolder(folder).result() or {}).get("complete") and self.wait_for_nothing(folder):
            return
        status = self.wait(self.start(self.go_on(folder, words), folder))
        if status != 0:
            raise Violation(f"going on ends with status {status}")

    def wait_for_nothing(self, folder: Path) -> bool:
        """Whether a run whose result is written has nothing left to deliver."""
        return bool((RunFolder(folder).result() or {}).get("tracking_delivered"))

    # --------------------------------------------------------------------------------------------- references

    def reference(self) -> None:
        """The undisturbed runs and study."""
        for kind, overrides in (("inline", ["execution=inline"]), ("ray", [])):
            folder = self.root / f"whole-{kind}"
            if self.wait(self.start(self.words(folder, *overrides), folder)) != 0:
                raise Violation(f"the undisturbed run failed, see {folder}.log")
            self.check(folder)
        folder = self.root / "whole-study"
        if self.wait(self.start(["tune", "study.yaml", "--output", str(folder)], folder)) != 0:
            raise Violation(f"the undisturbed study failed, see {folder}.log")

    def check(self, folder: Path) -> None:
        """One run equals the undisturbed one, and MLflow has it once."""
        self.check_folder(folder, self.root / "whole-inline", ROUNDS)
        database = sqlite3.connect(f"file:{folder.parent / 'mlflow.db'}?mode=ro", uri=True)
        try:
            runs = database.execute(
                "select run_uuid from tags where key = 'story' and value = ?", [folder.name]
            ).fetchall()
            if len(runs) != 1:
                raise Violation(f"{len(runs)} runs in MLflow")
            points = database.execute(
                "select key, step, count(*) from metrics where run_uuid = ? group by key, step", runs[0]
            ).fetchall()
            (status,) = database.execute("select status from runs where run_uuid = ?", runs[0]).fetchone()
        finally:
            database.close()
        if status != "FINISHED":
            raise Violation(f"the run in MLflow is {status}")
        twice = sorted({key for key, _, count in points if count != 1})
        if twice:
            raise Violation(f"points of {', '.join(twice)} are in MLflow more than once")
        for key in ("train/loss", "test/accuracy", "comm/uplink_bytes"):
            steps = sorted(step for found, step, _ in points if found == key)
            if steps != [line["round"] for line in RunFolder(folder).rounds() if line.get(key) is not None]:
                raise Violation(f"MLflow has {key} of rounds {steps}")

    def check_folder(self, folder: Path, whole: Path, rounds: int) -> None:
        """Model and lines of one run's folder are those of another."""
        one, other = RunFolder(folder), RunFolder(whole)
        text = one.rounds_file.read_text(encoding="utf-8")
        lines = one.rounds()
        if text.count("\n") != len(lines) or not text.endswith("\n"):
            raise Violation("rounds.jsonl has lines that are not whole")
        if [line["round"] for line in lines] != list(range(1, rounds + 1)):
            raise Violation(f"rounds.jsonl has rounds {[line['round'] for line in lines]}")
        if list(map(comparable, lines)) != list(map(comparable, other.rounds())):
            raise Violation("other lines than those of the undisturbed run")
        if one.model_file.read_bytes() != other.model_file.read_bytes():
            raise Violation("another model than that of the undisturbed run")

    # ------------------------------------------------------------------------------------------------ stories

    def driver_inline(self, folder: Path) -> None:
        """The process of an inline run is killed, up to three times."""
        self._killed_command(folder, "execution=inline")

    def driver_ray(self, folder: Path) -> None:
        """The command is killed, and the private Ray with it."""
        self._killed_command(folder)

    def _killed_command(self, folder: Path, *overrides: str) -> None:
        words = self.words(folder, *overrides)
        for _ in range(self.random.randint(1, 3)):
            process = self.start(self.go_on(folder, words), folder)
            if not self.after_a_while(process, folder):
                if process.exitcode != 0:
                    raise Violation(f"undisturbed, it ends with status {process.exitcode}")
                break
            self.kill(process, "command")
            process.join()
        self.to_the_end(folder, words)
        self.check(folder)

    def actors(self, folder: Path) -> None:
        """Client actors are killed while the run goes on."""
        process = self.start(self.words(folder), folder)
        for _ in range(self.random.randint(1, 3)):
            if self.after_a_while(process, folder):
                self._kill_below(process, "ray::HostActor", "client actor")
        if self.wait(process) != 0:
            raise Violation(f"the run ends with status {process.exitcode}")
        self.check(folder)

    def driver_actor(self, folder: Path) -> None:
        """The driver's actor is killed; the command says so, and the run is resumed."""
        words = self.words(folder)
        process = self.start(words, folder)
        killed = self.after_a_while(process, folder) and self._kill_below(
            process, "ray::DriverActor", "driver"
        )
        if self.wait(process) not in ((0, 1, 2) if killed else (0,)):
            raise Violation(f"the run ends with status {process.exitcode}")
        self.to_the_end(folder, words)
        self.check(folder)

    def _kill_below(self, process: BaseProcess, title: str, what: str) -> bool:
        try:
            below = psutil.Process(process.pid).children(recursive=True)
            found = [each for each in below if " ".join(each.cmdline()).startswith(title)]
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            return False
        if found:
            self.kill(self.random.choice(found), what)
        return bool(found)

    def tracking_server(self, folder: Path) -> None:
        """The MLflow server is killed and started again while the run goes on."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        store = f"sqlite:///{self.root / 'mlflow.db'}"
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
        command += ["--backend-store-uri", store, "--artifacts-destination", str(self.root / "mlartifacts")]

        def serve() -> subprocess.Popen[bytes]:
            quiet = subprocess.DEVNULL
            server = subprocess.Popen(
                command, cwd=self.root, stdout=quiet, stderr=quiet, start_new_session=True
            )
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and server.poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        return server
                time.sleep(0.1)
            os.killpg(server.pid, signal.SIGKILL)
            raise RuntimeError("the MLflow server does not start")

        server = serve()
        try:
            uri = f"tracking.uri=http://127.0.0.1:{port}"
            process = self.start(self.words(folder, "execution=inline", uri), folder)
            if self.after_a_while(process, folder):
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
                self.kills["tracking server"] += 1
                if self.random.random() < 0.7:
                    process.join(self.random.uniform(0, 5))
                    server = serve()
            if self.wait(process) not in (0, 2):
                raise Violation(f"the run ends with status {process.exitcode}")
            if server.poll() is not None:
                server = serve()
            if process.exitcode == 2:  # it was away before the run began
                self.to_the_end(folder, self.words(folder, "execution=inline", uri))
            elif self.wait(self.start(["sync", str(folder)], folder)) != 0:
                raise Violation("sync does not deliver")
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
        self.check(folder)

    def coordinator(self, folder: Path) -> None:
        """The command of a study is killed, up to three times; the same command goes on."""
        words = ["tune", "study.yaml", "--output", str(folder)]
        for _ in range(self.random.randint(1, 3)):
            process = self.start(words, folder)
            if not self.after_a_while(process, folder, STUDY_LINES):
                break
            self.kill(process, "coordinator")
            process.join()
        status = self.wait(self.start(words, folder))
        if status != 0:
            raise Violation(f"going on ends with status {status}")
        whole = self.root / "whole-study"
        runs = [
            {path.parent.relative_to(top) for path in top.glob("*/*/rounds.jsonl")} for top in (folder, whole)
        ]
        if runs[0] != runs[1] or not runs[0]:
            raise Violation(f"trials {sorted(map(str, runs[0]))} instead of {sorted(map(str, runs[1]))}")
        for run in runs[0]:
            self.check_folder(folder / run, whole / run, STUDY["rounds"])


def main() -> int:
    """Tell stories for some minutes; 1 where any ended badly."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    names = ("driver_inline", "driver_ray", "actors", "driver_actor", "tracking_server", "coordinator")
    parser.add_argument("stories", nargs="*", default=names, help=f"of {', '.join(names)}; all by default")
    arguments = parser.parse_args()
    os.environ.update(PYTHONPATH=str(ROOT), RAY_USAGE_STATS_ENABLED="0", GIT_PYTHON_REFRESH="quiet")
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    chaos = Chaos(root, random.Random(arguments.seed))
    deadline = time.monotonic() + 60 * arguments.minutes
    chaos.reference()
    print(f"undisturbed runs and study done, the stories lie in {root}", flush=True)
    told: Counter[str] = Counter()
    bad = 0
    while time.monotonic() < deadline:
        name = arguments.stories[sum(told.values()) % len(arguments.stories)]
        folder = root / f"{name.replace('_', '-')}-{told[name]:03d}"
        told[name] += 1
        before, started = chaos.kills.copy(), time.monotonic()
        story: Callable[[Path], None] = getattr(chaos, name)
        try:
            story(folder)
            ending = "as undisturbed"
        except Exception as error:
            bad += 1
            ending = f"VIOLATION: {error}; see {folder}.log"
            if not isinstance(error, Violation):
                traceback.print_exc()
        kills = ", ".join(f"{count} {what}" for what, count in (chaos.kills - before).items()) or "no kill"
        print(f"{folder.name}  {kills}  {time.monotonic() - started:.0f} s  {ending}", flush=True)
        if ending == "as undisturbed":
            shutil.rmtree(folder)
    stories = ", ".join(f"{count} {name}" for name, count in told.items())
    kills = ", ".join(f"{count} {what}" for what, count in chaos.kills.items())
    print(f"seed {arguments.seed}: {stories}; killed {kills}; {bad} violations")
    if not bad:
        shutil.rmtree(root)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
