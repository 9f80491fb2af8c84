"""Whether an exported run is the same in Flower: its simulation, and a SuperLink with two SuperNodes.

    python -m tests.export_flower                    # fedavg, topk and sparsyfed
    python -m tests.export_flower topk --env peers/flower-app

It makes an environment with Flower (``pip install flwr``, by pip's own configuration) on top of the one that
runs it, unless there is one in the folder of ``--env``; exports a short run of each method; has Flower run
the apps in both ways, as their README says; and compares the models. Run it before a release.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import site
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.cli import main as sparsyfed
from cluster.export.flower import FLOWER
from tests.same_bits import COMMON, ROOT, hash_of

METHODS = ("fedavg", "topk", "sparsyfed")
_SECONDS = 3600  # of a run, on a machine that is busy


def make_environment(folder: Path) -> None:
    """An environment with Flower, which finds everything else in the one that runs this."""
    venv.create(folder, with_pip=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "beneath.pth").write_text("\n".join([*site.getsitepackages(), str(ROOT)]) + "\n")
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", f"flwr=={FLOWER}"], check=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Flower:
    """Flower's programs in their environment, with a home of their own."""

    def __init__(self, environment: Path, home: Path) -> None:
        self._bin, self._home = environment / "bin", home
        self._variables = os.environ | {
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(home / "ray-token"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "OMP_NUM_THREADS": "1",
        }
        home.mkdir()
        (home / "ray-token").write_text("0" * 64)

    @contextmanager
    def started(self, program: str, *words: str) -> Iterator[int]:
        """A program that serves on 127.0.0.1 until it is left; its port."""
        port = free_port()
        command = [str(self._bin / program), "--insecure", "--host", "127.0.0.1", "--port", str(port), *words]
        with open(self._home / f"{program}-{port}.log", "wb") as log:
            process = subprocess.Popen(command, env=self._variables, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_for(process, port, Path(log.name))
            yield port
        finally:
            process.terminate()
            process.wait(timeout=60)

    def _wait_for(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    return
            except urllib.error.HTTPError:
                return  # it answers
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(f"did not start:\n{log.read_text()[-2000:]}")

    def run(self, app: Path, superlink: int, output: Path) -> str:
        """Have a SuperLink run the app; the hash of the model that it ends in."""
        (self._home / "config.toml").write_text(
            f'[superlink.here]\naddress = "127.0.0.1:{superlink}"\ninsecure = true\n'
        )
        told = subprocess.run(
            [self._bin / "flwr", "run", str(app), "here", "--stream", "--run-config", f'output="{output}"'],
            env=self._variables, cwd=self._home, capture_output=True, text=True, timeout=_SECONDS,
        )  # fmt: skip
        if not (output / "model.safetensors").is_file():
            raise RuntimeError(f"no model in {output}:\n{told.stdout[-4000:]}{told.stderr[-2000:]}")
        return hash_of(output)


def compare(methods: Sequence[str], environment: Path, folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """Hashes of each method's model: this project's run, the simulation's, the SuperLink's with two nodes."""
    apps = {}
    for method in methods:
        run, app = folder / method, folder / f"{method}-app"
        sparsyfed(["run", "quickstart", *COMMON, f"algorithm.name={method}", "--output", str(run)])
        sparsyfed(["export", str(run), "--to", "flower", "--output", str(app)])
        apps[method] = app
    here, flower = "--disable-runtime-dependency-installation", Flower(environment, folder / "home")
    simulated, deployed = {}, {}
    with flower.started("flower-superlink", "--simulation", here) as superlink:
        for method, app in apps.items():
            simulated[method] = flower.run(app, superlink, folder / f"{method}-simulation")
    with ExitStack() as stack:
        superlink = stack.enter_context(flower.started("flower-superlink", here))
        for _ in range(2):
            stack.enter_context(flower.started("flower-supernode", "--superlink", f"127.0.0.1:{superlink}"))
        for method, app in apps.items():
            deployed[method] = flower.run(app, superlink, folder / f"{method}-superlink")
    for method in methods:
        yield method, hash_of(folder / method), simulated[method], deployed[method]


def main() -> int:
    """Compare and print; 1 where a model differs."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.export_flower", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("methods", nargs="*", default=list(METHODS), help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--env", type=Path, help="environment with Flower, made where there is none")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        environment = (asked.env or Path(place) / "env").absolute()
        if not (environment / "bin" / "flwr").is_file():
            make_environment(environment)
        rows = list(compare(asked.methods, environment, Path(place)))
    file = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", file.read_text()) if file.is_file() else None
    print(f"\nflwr {FLOWER}, {cpu[1] if cpu else platform.machine()}, Python {sys.version.split()[0]}")
    print("| method | sparsyfed | Flower's simulation | SuperLink, two SuperNodes | |\n|---|---|---|---|---|")
    for method, ours, simulated, deployed in rows:
        same = "same" if ours == simulated == deployed else "DIFFERS"
        print(f"| `{method}` | {ours} | {simulated} | {deployed} | {same} |")
    return 0 if all(len(set(hashes)) == 1 for _, *hashes in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
