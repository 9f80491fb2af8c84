"""Every file of ray_configs is what Ray takes; the commands of its README are tested in test_docs.py."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from cluster.command_line.arguments import parse
from cluster.configuration.config import resolve
from tests import kuberay_schema
from tests.documented_commands import ray_takes, sparsyfed_takes

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "ray_configs"
CLUSTERS = ["cluster-local.yaml", "cluster-aws-gpu.yaml", "cluster-gcp-gpu.yaml"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
(RAY,) = [package["version"] for package in LOCK["package"] if package["name"] == "ray"]


def load(name):
    return yaml.safe_load((CONFIGS / name).read_text())


# --- clusters that `ray up` makes


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_file_is_what_ray_up_takes(name):
    config = load(name)
    validate_config(prepare_config(config))  # as `ray up` does, the provider's defaults filled in
    schema = json.loads((Path(sys.modules["ray"].__path__[0]) / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        jsonschema.validate(config | {"setup_comands": []}, schema)
    for kind in config.get("available_node_types", {}).values():
        assert kind.get("max_workers", 0) <= config["max_workers"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_has_the_projects_ray_a_token_and_no_open_dashboard(name):
    config = load(name)
    assert config["docker"]["image"] == f"rayproject/ray:{RAY}-py311-gpu"
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["file_mounts"]["/home/ray/sparsyfed"] == "."
    assert "pip install /home/ray/sparsyfed" in config["setup_commands"]
    starts = [line for side in ("head", "worker") for line in config[f"{side}_start_ray_commands"]]
    assert [line for line in starts if "--head" in line and "--dashboard-host=127.0.0.1" in line]
    for line in starts:
        ray_takes(shlex.split(line)[1:])
    for line in config["setup_commands"] + config.get("head_setup_commands", []):
        assert not re.search(r"\bray\b", line.replace("/home/ray/", "")), "the image's Ray stays"


def test_on_aws_every_node_has_the_users_own_security_group():
    config = load("cluster-aws-gpu.yaml")
    # To a group that it makes or fills, Ray adds ssh from 0.0.0.0/0; one that is named it leaves alone.
    assert "security_group" not in config["provider"]
    for kind in config["available_node_types"].values():
        assert all(re.fullmatch("sg-[0-9a-f]{17}", each) for each in kind["node_config"]["SecurityGroupIds"])
    text = (CONFIGS / "cluster-aws-gpu.yaml").read_text(encoding="utf-8")
    assert re.findall(r"--cidr (\S+)", text) == ["203.0.113.7/32"]  # an address of the documentation's


def test_slurm_tokens_are_neither_committed_nor_shipped():
    token = re.search(
        r'RAY_AUTH_TOKEN_PATH="\$PWD/(\.ray-token-)', (CONFIGS / "slurm.sh").read_text("utf-8")
    )[1]
    for name in (".gitignore", ".rayignore"):
        assert f"{token}*" in (ROOT / name).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", [path.name for path in CONFIGS.iterdir() if path.is_file()])
def test_no_file_opens_a_dashboard_or_turns_tokens_off(name):
    text = (CONFIGS / name).read_text()
    assert "0.0.0.0" not in text
    assert "disabled" not in text
    for version in re.findall(r"(?:ray|sparsyfed|rayVersion): ?\"?(\d+\.\d+\.\d+)", text):
        assert version == RAY


# --- the runtime environment


def test_the_runtime_environment_installs_the_projects_dependencies():
    tree = load("runtime-env.yaml")
    assert tree["pip"] == [line for line in PROJECT["dependencies"] if not line.startswith("ray[")]
    environment = RuntimeEnv(**tree, working_dir="https://example.com/code.zip")
    assert environment.has_pip()
    assert environment["config"]["setup_timeout_seconds"] == 1800
    assert set(tree) <= RuntimeEnv.known_fields


# --- Kubernetes


#: The part of the operator's own CRD that the file uses; see tests/kuberay_schema.py.
RAYJOB = json.loads(kuberay_schema.SCHEMA.read_text(encoding="utf-8"))


def test_the_rayjob_is_what_kuberays_own_definition_takes():
    job = load("kuberay-rayjob.yaml")
    jsonschema.Draft202012Validator.check_schema(RAYJOB)
    jsonschema.validate(job, RAYJOB)
    assert (job["apiVersion"], job["kind"], list(job["metadata"])) == ("ray.io/v1", "RayJob", ["name"])
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == RAY
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    assert {container["image"].rpartition(":")[2] for container in containers} == {RAY}
    for group in groups:
        ray_takes(
            ["start", "--head", *(f"--{key}={value}" for key, value in group["rayStartParams"].items())]
        )
        mounted = [
            m["name"] for c in group["template"]["spec"]["containers"] for m in c.get("volumeMounts", [])
        ]
        assert mounted == [volume["name"] for volume in group["template"]["spec"].get("volumes", [])]
    command = shlex.split(job["spec"]["entrypoint"])
    assert command[:3] == ["python", "-m", "cluster"]
    sparsyfed_takes(command[3:])


@pytest.mark.parametrize(
    ("path", "right", "wrong"),
    [
        ("spec", "backoffLimit", "backOffLimit"),
        ("spec.rayClusterSpec", "rayVersion", "rayVersoin"),
        ("spec.rayClusterSpec.authOptions", "mode", "modus"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec", "volumes", "volume"),
        ("spec.rayClusterSpec.workerGroupSpecs.0", "maxReplicas", "maxReplica"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources", "limits", "limit"),
    ],
)
def test_a_misspelt_field_of_the_rayjob_is_refused(path, right, wrong):
    job = place = load("kuberay-rayjob.yaml")
    for key in path.split("."):
        place = place[int(key) if key.isdigit() else key]
    place[wrong] = place.pop(right)
    with pytest.raises(jsonschema.ValidationError, match=f"'{wrong}' was unexpected|'{right}' is a required"):
        jsonschema.validate(job, RAYJOB)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("backoffLimit", "0"),
        ("rayClusterSpec.authOptions.mode", "tokens"),
        ("rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),  # flags are text
        ("rayClusterSpec.headGroupSpec.template.spec.containers.0.resources.requests.memory", "8 GB"),
    ],
)
def test_a_wrong_value_of_the_rayjob_is_refused(path, value):
    job = load("kuberay-rayjob.yaml")
    place, (*keys, last) = job["spec"], path.split(".")
    for key in keys:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError, match=repr(value)):
        jsonschema.validate(job, RAYJOB)


def test_of_a_definition_the_part_in_use_is_kept():
    text, places = {"type": "string", "description": "words"}, {"type": "integer", "default": 1}
    item = {"type": "object", "properties": {"name": text, "size": places}, "required": ["name"]}
    whole = {
        "type": "object",
        "properties": {
            "labels": {"type": "object", "additionalProperties": text},
            "parts": text | {"items": item},
        },
    }
    part = kuberay_schema.part_of(whole, {"parts": [{"name": "a"}, {"size": 3}]})
    kept = {"name": {"type": "string"}, "size": {"type": "integer"}}
    assert part["properties"]["parts"]["items"] == {
        "type": "object",
        "properties": kept,
        "required": ["name"],
        "additionalProperties": False,
    }
    assert list(part["properties"]) == ["parts"]
    with pytest.raises(SystemExit, match=r"\.parts\[\]: nmae: no field of the CRD"):
        kuberay_schema.part_of(whole, {"parts": [{"nmae": "a"}]})


def test_the_image_is_built_on_the_projects_ray_from_files_that_exist():
    lines = (CONFIGS / "Dockerfile").read_text().splitlines()
    built = [line for line in lines if not line.startswith("#")]
    # The platform is for GPUs unless it is asked for another, and known behind FROM as well.
    assert built[:3] == ["ARG PLATFORM=gpu", f"FROM rayproject/ray:{RAY}-py311-${{PLATFORM}}", "ARG PLATFORM"]
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert {"pyproject.toml", *PROJECT["license-files"], "algorithms", "cluster", "ray_configs"} <= set(
        copied
    )
    assert set(packages["packages"]) <= set(copied)
    assert all((ROOT / word).exists() for word in copied)


@pytest.mark.parametrize(
    ("platform", "index"), [("gpu", ""), ("cpu", "https://download.pytorch.org/whl/cpu")]
)
def test_the_image_without_gpus_gets_the_torch_without_cuda(tmp_path, platform, index):
    text = (CONFIGS / "Dockerfile").read_text()
    (tmp_path / "sparsyfed").mkdir()
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$PIP_EXTRA_INDEX_URL"; echo "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", re.search("^RUN (.*)", text, re.MULTILINE | re.DOTALL)[1]],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PLATFORM": platform},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [index, "install --no-cache-dir ./sparsyfed"]
    assert not (tmp_path / "sparsyfed").exists()


def test_the_rayjob_has_the_image_that_its_commands_build():
    job = load("kuberay-rayjob.yaml")["spec"]["rayClusterSpec"]
    groups = [job["headGroupSpec"], *job["workerGroupSpecs"]]
    (image,) = {c["image"] for group in groups for c in group["template"]["spec"]["containers"]}
    commands = re.findall(r"docker build (.*) \.\n", (CONFIGS / "README.md").read_text())
    tags = {command.rpartition(" ")[2]: "PLATFORM=cpu" in command for command in commands}
    assert tags == {image: False, f"{image}-cpu": True}


# --- Slurm


STAND_INS = {
    # More nodes than a pipe holds: whoever reads only the first must not fail when the writer is cut off.
    "scontrol": "seq -f node%.0f 1 20000",
    # One node is enough to see what every node would start.
    "srun": 'shift; exec "$@"',
    "ray": 'p="$RAY_AUTH_TOKEN_PATH"; printf "%s\\n" "$RAY_AUTH_MODE" "$(stat -c %a $p)" "$(cat $p)" "$@"',
}


def run_slurm(folder, *words):
    """What `slurm.sh WORDS` starts on each node: (authentication, mode of the token's file, token, words)."""
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    activate = folder / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True, exist_ok=True)
    activate.write_text(f'PATH="{folder}:{Path(sys.executable).parent}:$PATH"\n')
    job = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_NUM_NODES": "3"}
    job |= {"SLURM_CPUS_ON_NODE": "16", "SLURM_GPUS_ON_NODE": "2", "VENV": str(folder / "venv")}
    done = subprocess.run(
        ["bash", CONFIGS / "slurm.sh", *words],
        env=os.environ | job,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not list(folder.glob(".ray-token*"))  # gone with the job
    authentication, mode, token, *command = done.stdout.splitlines()
    return authentication, mode, token, command


def test_slurm_starts_one_ray_with_a_token_and_runs_the_command_on_its_head(tmp_path):
    authentication, mode, token, command = run_slurm(tmp_path, "run", "quickstart", "model.channels=[8, 16]")
    assert (authentication, mode, len(token)) == ("token", "600", 64)
    assert token != run_slurm(tmp_path)[2]
    ray_takes(command)
    options, entry = command[: command.index("--")], command[command.index("--") + 1 :]
    assert options[:5] == ["symmetric-run", "--address", "node1:24567", "--min-nodes", "3"]
    # What symmetric-run hands on, every node's `ray start` must take, the head's and a worker's.
    for side in (["--head", "--port=24567"], ["--address", "node1:24567"]):
        ray_takes(["start", *side, *options[5:]])
    assert {"--num-cpus=16", "--num-gpus=2"} <= set(options)
    assert entry == ["python", "-m", "cluster", "run", "quickstart", "model.channels=[8, 16]", "address=auto"]
    assert resolve(entry[4], entry[5:]).model.options["channels"] == [8, 16]
    assert run_slurm(tmp_path)[3][-2:] == ["run", "address=auto"]


def test_a_job_arrays_task_plays_its_shard(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f'PATH="{tmp_path}:$PATH"\n')
    (tmp_path / "python").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    words = ["run", "paper-methods", "algorithm.sparsity=[0.9, 0.95]", "--output", "runs/methods"]
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "10", "VENV": str(tmp_path)}
    done = subprocess.run(
        ["bash", CONFIGS / "slurm-array.sh", *words],
        env=os.environ | task,
        capture_output=True,
        text=True,
        check=True,
    )
    command = done.stdout.splitlines()
    assert command == ["-m", "cluster", *words, "--shard", "3/10"]
    assert parse(command[2:]).shard == (3, 10)


# --- submit.py


def received(*words):
    """The command line that a head's shell gives `submit.py`, and the words that it restores."""
    remote = subprocess.run(
        [
            "bash",
            "-c",
            " ".join([shlex.quote(sys.executable), "-c", "'import sys; print(sys.argv[1:])'", *words]),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    code = f"import sys; sys.path.insert(0, {str(CONFIGS)!r}); import submit; "
    code += f"print(submit.restored({remote.stdout}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


TIERS = "devices.tiers.small={share: 0.3, sparsity: 0.99}"


def test_values_split_inside_brackets_are_joined_again():
    words = ["run", "quickstart", TIERS, "model.channels=[8, 16]", "rounds=5", "--output", "x"]
    assert yaml.safe_load(received(*words).stdout) == words
    lost = received("run", "model.channels=[8,", "rounds=5")
    assert lost.returncode != 0
    assert "brackets do not close in: run model.channels=[8, rounds=5" in lost.stderr


def test_quoted_words_survive_any_shell():
    words = [
        "run",
        'algorithm.plain_layers=["*shortcut*"]',
        "tracking.run_name=it's $HOME; 100% `true` > x",
        TIERS,
    ]
    quoted = subprocess.run(
        [sys.executable, CONFIGS / "submit.py", "--quote", *words], capture_output=True, text=True, check=True
    )
    sent = quoted.stdout.split()
    assert sent[0] == "--quoted"
    code = "import json, sys; sys.path.insert(0, sys.argv.pop(1)); import submit; "
    code += "print(json.dumps(submit.restored(sys.argv[1:])))"
    command = " ".join(
        [shlex.quote(sys.executable), "-c", shlex.quote(code), shlex.quote(str(CONFIGS)), *sent]
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == words


def test_shell_scripts_have_no_syntax_errors():
    for script in CONFIGS.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
        assert os.access(script, os.X_OK)
