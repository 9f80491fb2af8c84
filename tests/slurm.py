"""Whether ``ray_configs/slurm.sh`` and ``slurm-array.sh`` do on a real Slurm what they say, to the last bit.

    python -m tests.slurm

Needs Linux, root and the programs of Slurm and MUNGE (Debian, Ubuntu: ``apt-get install slurm-wlm munge``);
where they are missing it says so and exits 2. It makes a cluster of one node and two CPUs in a temporary
folder, with a key of its own, submits a short run, its resumption and a grid as a job array, and compares
them with the same runs inline. The daemons live in a namespace of processes of their own: a job ends by
stopping every Ray on its node, and so reaches no other one of this machine. Run it before a release.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.cli import main as sparsyfed
from cluster.records.run_folder import RunFolder, comparable
from tests.same_bits import COMMON, ROOT, hash_of

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "unshare")
_SECONDS = 1200  # of a job, on a machine that is busy
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # where daemons lie

#: Every round is evaluated: the last one of a run that stops is in any case.
SMALL = (*(word for word in COMMON if not word.startswith("execution=")), "rounds=4", "evaluate_every=1")
METHODS = ("fedavg", "sparsyfed")
GRID = ("run", "compare-digits", f"method=[{','.join(METHODS)}]", *SMALL)


class NotHere(Exception):
    """No Slurm can be had on this machine; the message says why."""


def check() -> None:
    """Refuse what can be known beforehand."""
    if sys.platform != "linux":
        raise NotHere(f"Slurm's daemons need Linux; this is {sys.platform}")
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]:
        raise NotHere(f"not found: {', '.join(missing)}; apt-get install slurm-wlm munge util-linux")
    if os.geteuid() != 0:
        raise NotHere(
            "slurmd starts jobs as their users, which takes root; run it as root, in a container say"
        )
    alone = subprocess.run([*_namespace(), "true"], capture_output=True, text=True)
    if alone.returncode != 0:
        raise NotHere(f"no namespace of processes: {alone.stderr.strip()}")


def _namespace() -> list[str]:
    """What a command begins with whose processes see only each other and end with it."""
    return [
        shutil.which("unshare", path=_PATH) or "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]


def configuration(folder: Path, host: str, controller: int, daemon: int) -> str:
    """A ``slurm.conf`` of one node with two CPUs, all of whose files lie in a folder.

    Args:
        folder: The folder.
        host: This machine's name, which the node has too.
        controller: Port of slurmctld.
        daemon: Port of slurmd.
    """
    keys = {
        "ClusterName": "sparsyfed",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": controller,
        "SlurmdPort": daemon,
        "SlurmUser": "root",
        "AuthInfo": f"socket={folder}/munge.socket",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmdParameters": "config_overrides",  # two CPUs, whatever there are
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "MpiDefault": "none",
        "SwitchType": "switch/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "ReturnToService": 2,
        "NodeName": f"{host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN",
        "PartitionName": f"all Nodes={host} Default=YES MaxTime=INFINITE State=UP",
    }
    return "".join(f"{key}={value}\n" for key, value in keys.items())


class Slurm:
    """A cluster of this machine alone.

    Args:
        folder: Where everything of it lies.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("state", "spool"):
            (folder / name).mkdir()
        ports = [_free_port() for _ in range(2)]
        file = folder / "slurm.conf"
        file.write_text(configuration(folder, socket.gethostname().partition(".")[0], *ports))
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._variables = os.environ | {
            "PATH": _PATH,
            "SLURM_CONF": str(file),
            "VENV": sys.prefix,
            "RAY_TMPDIR": str(folder / "ray"),  # another Ray's address lies in /tmp/ray
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    @contextmanager
    def started(self) -> Iterator[None]:
        """Its daemons, until it is left."""
        own = self._folder
        munge = [
            "munged",
            "--force",
            "--foreground",
            f"--socket={own}/munge.socket",
            f"--key-file={own}/munge.key",
        ]
        munge += [f"--{kind}-file={own}/munge.{kind}" for kind in ("log", "pid", "seed")]
        script = f"{' '.join(munge)} & slurmctld -D & slurmd -D & wait"
        with open(own / "daemons.log", "wb") as log:
            daemons = subprocess.Popen(
                [*_namespace(), "bash", "-c", script],
                env=self._variables,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._until(
                "its node is idle", lambda: "idle" in self._tell("sinfo", "--noheader", "--format=%t")
            )
            yield
        finally:
            daemons.kill()  # and with it all in its namespace; it heeds no other signal
            daemons.wait(timeout=60)

    def submit(self, *words: str) -> str:
        """Have ``sbatch`` run a script to its end; how each job or task of it ended."""
        logs = self._folder / "job-%j.log"
        job = self._tell("sbatch", "--parsable", f"--chdir={ROOT}", f"--output={logs}", *words).strip()
        if not job.isdigit():
            raise RuntimeError(f"sbatch {' '.join(words)}: {job}")
        try:
            self._until("the job is over", lambda: not self._tell("squeue", "--noheader", f"--jobs={job}"))
        finally:
            self._tell("scancel", job)  # nothing where it is over
        shown = self._tell("scontrol", "--oneliner", "show", "job", job)
        ended = " ".join(
            f"{state} {code}" for state, code in re.findall(r"JobState=(\S+).*?ExitCode=(\S+)", shown)
        )
        if set(ended.split()) != {"COMPLETED", "0:0"}:
            told = "".join(
                f"{file.name}:\n{file.read_text()[-3000:]}\n" for file in self._folder.glob("job-*.log")
            )
            raise RuntimeError(f"sbatch {' '.join(words)} ended as {ended}\n{told}")
        return f"job {job}: {ended}"

    def _tell(self, *words: str) -> str:
        done = subprocess.run(words, env=self._variables, capture_output=True, text=True, timeout=120)
        return done.stdout or done.stderr

    def _until(self, what: str, reached: Callable[[], bool]) -> None:
        until = time.monotonic() + _SECONDS
        while not reached():
            if time.monotonic() > until:
                log = (self._folder / "daemons.log").read_text(errors="replace")
                raise RuntimeError(f"waited {_SECONDS} s until {what}:\n{log[-3000:]}")
            time.sleep(1.0)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def difference(run: Path, reference: Path) -> str | None:
    """What a run lacks of its reference; None where it is complete and the same."""
    if not (run / "result.json").is_file():
        return "no result"
    own, other = RunFolder.open(run), RunFolder.open(reference)
    if not (own.result() or {}).get("complete"):
        return "not complete"
    if [comparable(line) for line in own.rounds()] != [comparable(line) for line in other.rounds()]:
        return "other rounds"
    return None if hash_of(run) == hash_of(reference) else "another model"


def compare(folder: Path) -> Iterator[tuple[str, str, str | None]]:
    """What was submitted, how it ended and what differs."""
    inline = folder / "inline"
    sparsyfed([*GRID, "execution=inline", "--output", str(inline)])
    references = {run.name: run for run in inline.iterdir() if (run / "result.json").is_file()}
    if len(references) != len(METHODS):
        raise RuntimeError(f"the inline runs are not complete: {sorted(references)}")
    (sparse,) = (run for name, run in references.items() if "sparsyfed" in name)
    (folder / "slurm").mkdir()
    slurm, one, grid = Slurm(folder / "slurm"), folder / "one", folder / "grid"
    script, array = "ray_configs/slurm.sh", "ray_configs/slurm-array.sh"
    with slurm.started():
        halfway = [script, "run", "quickstart", *SMALL, "stop_after=2", "--output", str(one)]
        ended = slurm.submit("--nodes=1", *halfway)
        kept = len(RunFolder.open(one).rounds())
        yield "slurm.sh run ... stop_after=2", ended, None if kept == 2 else f"{kept} rounds"
        ended = slurm.submit("--nodes=1", script, "resume", str(one), "stop_after=null")
        yield "slurm.sh resume", ended, difference(one, sparse)
        tasks = [array, *GRID, "actors=1", "--output", str(grid)]
        ended = slurm.submit(f"--array=1-{len(METHODS)}", "--cpus-per-task=1", *tasks)
        for name, reference in sorted(references.items()):
            yield f"slurm-array.sh, {name}", ended, difference(grid / name, reference)
        rows = len((grid / "table.csv").read_text().splitlines()) - 1
        yield "slurm-array.sh, table.csv", ended, None if rows == len(METHODS) else f"{rows} rows"
    tokens = [path.name for path in ROOT.glob(".ray-token-*")]
    yield "tokens left behind", "", ", ".join(tokens) or None


def main() -> int:
    """Compare and print; 1 where something differs, 2 where there is no Slurm."""
    argparse.ArgumentParser(
        prog="python -m tests.slurm", description=(__doc__ or "").split("\n")[0]
    ).parse_args()
    try:
        check()
    except NotHere as error:
        print(f"python -m tests.slurm: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as place:
        rows = list(compare(Path(place)))
    version = subprocess.run(
        ["slurmctld", "-V"], env=os.environ | {"PATH": _PATH}, capture_output=True, text=True
    )
    print(f"\n{version.stdout.strip()}, Python {sys.version.split()[0]}\n| what | ended | |\n|---|---|---|")
    for what, ended, found in rows:
        print(f"| {what} | {ended} | {found or 'same'} |")
    return 0 if all(found is None for *_, found in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
