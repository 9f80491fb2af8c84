"""Promise 1 on real Ray: the same bits whoever computes them, also when an actor or the driver is killed."""

import json
import logging
import os
import shutil
import signal
import subprocess
import threading
import time

import psutil
import pytest
from torch import nn

import cluster
from cluster.actors.actor_pool import PlacementError
from cluster.actors.placement import ActorKind, Bundle
from cluster.actors.ray_engine import RayEngine
from cluster.actors.ray_session import ClusterError, ray_engine
from cluster.disk import DiskError
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder, comparable
from cluster.rounds.driver import Driver

# A ResNet-18 of full width (11.2 million weights, BatchNorm) and clients of very unequal sizes: sums of this
# many terms differ in the last bit somewhere if they are grouped differently.
OVERRIDES = [
    "rounds=2",
    "cohort=6",
    "checkpoint_every=1",
    "model.name=resnet18",
    "partition.name=dirichlet",
    "partition.clients=60",
    "partition.alpha=0.3",
    "local.epochs=1",
    "algorithm.sparsity=0.95",
    "tracking.enabled=false",
]


@pytest.fixture(scope="module")
def local_ray(start_ray):
    start_ray(4)  # three actors and room for the driver, whatever this machine has


def config(*more):
    return cluster.resolve("quickstart", [*OVERRIDES, *more])


def lines(folder):
    return [comparable(line) for line in RunFolder(folder).rounds()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The inline run that every other run must equal."""
    folder = tmp_path_factory.mktemp("inline") / "run"
    cluster.run(config("execution=inline"), folder)
    return folder


def assert_same_run(folder, reference):
    assert (folder / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert lines(folder) == lines(reference)


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_any_number_of_actors_gives_the_bits_of_inline(local_ray, undisturbed, tmp_path, actors):
    cluster.run(config(f"actors={actors}"), tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_one_actor_a_client(local_ray, tmp_path):
    small = ["model.name=small_cnn", "cohort=4", "partition.clients=4", "cpus_per_actor=0.25"]
    cluster.run(config(*small, "actors=4"), tmp_path / "four")
    cluster.run(config(*small, "execution=inline"), tmp_path / "inline")
    assert_same_run(tmp_path / "four", tmp_path / "inline")


def test_a_table_and_classes_of_texts_give_the_bits_of_inline(local_ray, tmp_path):
    few = ["rounds=2", "cohort=3", "partition.clients=6", "local.epochs=1", "tracking.enabled=false"]
    table = ["data.name=tests.cluster.workload.test_column_runs:tables", "data.label_column=likes"]
    table += ["objective.name=multilabel", "partition.name=iid", "model.name=mlp", "model.hidden=[8]"]
    text = ["objective.name=sequence_classification", "data.name=tiny_text", "data.length=16"]
    text += ["model.name=transformer_classifier", "model.layers=1", "model.width=16", "model.heads=2"]
    for kind, sections in {"table": table, "text": text}.items():
        overrides = [*sections, *few]
        for name, more in {"ray": ["actors=2"], "inline": ["execution=inline"]}.items():
            cluster.run(cluster.resolve("quickstart", [*overrides, *more]), tmp_path / kind / name)
        assert_same_run(tmp_path / kind / "ray", tmp_path / kind / "inline")


def test_parts_of_the_model_give_the_bits_of_inline(local_ray, tmp_path):
    """Four clients of two budgets on two actors, which play parts and the whole model in turn."""
    tiers = "{whole: {share: 0.5, sparsity: 0.0}, part: {share: 0.5, sparsity: 0.8}}"
    small = [
        "model.name=small_cnn",
        "cohort=4",
        "partition.clients=8",
        "algorithm={name: fiarse, sparsity: 0.0}",
    ]
    parts = [*small, f"devices.tiers={tiers}"]
    cluster.run(config(*parts, "actors=2"), tmp_path / "two")
    cluster.run(config(*parts, "execution=inline"), tmp_path / "inline")
    assert_same_run(tmp_path / "two", tmp_path / "inline")


def test_own_rows_new_clients_and_all_updates_give_the_bits_of_inline(local_ray, tmp_path):
    """What is judged on two actors by rows of clients, and a server that looks at every update."""
    small = ["model={name: mlp, hidden: [8]}", "partition.clients=8", "data.validation=0.2", "local.epochs=1"]
    judged = "{every: 1, rows: own, after: 2, unseen: 2, shots: [2]}"
    moon = ["rounds=3", "cohort=3", "algorithm.name=moon", f"evaluate_clients={judged}"]
    echo = ["rounds=1", "cohort=6", "partition.clients=6", "algorithm.name=ma_echo"]
    for kind, sections in {"moon": moon, "ma_echo": echo}.items():
        overrides = [*small, *sections, "tracking.enabled=false"]
        for name, more in {"ray": ["actors=2"], "inline": ["execution=inline"]}.items():
            cluster.run(cluster.resolve("quickstart", [*overrides, *more]), tmp_path / kind / name)
        assert_same_run(tmp_path / kind / "ray", tmp_path / kind / "inline")


def test_a_language_model_gives_the_bits_of_inline(local_ray, tmp_path):
    text = ["objective.name=language_model", "data.name=tiny_text", "data.length=16", "cohort=3"]
    text += [
        "partition.name=natural",
        "partition.clients=6",
        "partition.min_samples=60",
        "local.batch_size=16",
    ]
    model = ["model.name=transformer", "model.layers=1", "model.width=16", "model.heads=2"]
    overrides = [*text, *model, "rounds=2", "local.epochs=1", "tracking.enabled=false"]
    for name, more in {"ray": ["actors=2"], "inline": ["execution=inline"]}.items():
        cluster.run(cluster.resolve("quickstart", [*overrides, *more]), tmp_path / name)
    assert_same_run(tmp_path / "ray", tmp_path / "inline")


def test_masks_alone_give_the_bits_of_inline(local_ray, tmp_path):
    """The values that do not travel are worked out by each host by itself, and by the driver."""
    tiers = "devices.tiers={slow: {share: 0.5, compute: 1e9}, fast: {share: 0.5, compute: 2e9}}"
    small = ["model.channels=[4,8]", "model.hidden=16", "model.groups=2"]
    decided_late = [tiers, "devices.flops=sparse", "schedule.over_selection=2.0"]
    overrides = [
        *small,
        *decided_late,
        "algorithm.name=fedpm",
        "rounds=2",
        "local.epochs=1",
        "tracking.enabled=false",
    ]
    for name, more in {"ray": ["actors=2"], "inline": ["execution=inline"]}.items():
        cluster.run(cluster.resolve("quickstart", [*overrides, *more]), tmp_path / name)
    assert_same_run(tmp_path / "ray", tmp_path / "inline")


def test_what_clients_name_beside_their_updates_gives_the_bits_of_inline(local_ray, tmp_path):
    small = ["model.name=small_cnn", "cohort=4", "partition.clients=4", "rounds=2"]
    method = ["algorithm.name=fedrts", "algorithm.readjust_interval=1", "algorithm.sparsity=0.8"]
    for name, more in {"ray": ["actors=2"], "inline": ["execution=inline"]}.items():
        cluster.run(config(*small, *method, *more), tmp_path / name)
    assert_same_run(tmp_path / "ray", tmp_path / "inline")


def test_krum_among_attackers_gives_the_bits_of_inline(local_ray, tmp_path):
    """Updates travel to the driver from two actors; who does harm depends on neither."""
    small = [
        "model.name=small_cnn",
        "cohort=6",
        "partition.clients=6",
        "rounds=2",
        "algorithm={name: fedavg}",
    ]
    rule = ["aggregation.name=multi_krum", "byzantine.share=0.2"]
    for name, more in {"ray": ["actors=2"], "inline": ["execution=inline"]}.items():
        cluster.run(config(*small, *rule, *more), tmp_path / name)
    assert_same_run(tmp_path / "ray", tmp_path / "inline")


def test_private_rounds_give_the_bits_of_inline(local_ray, tmp_path):
    """Clipped where they are folded, on two actors, by a clip that moves every round; noise at the driver."""
    pytest.importorskip("dp_accounting", reason="epsilon is composed by dp-accounting, the extra dp")
    small = ["model.name=small_cnn", "cohort=4", "partition.clients=8", "rounds=3", "sampler.name=poisson"]
    dp = ["privacy.dp={clip: 0.3, noise_multiplier: 0.3, adaptive: true}", "algorithm.name=fixed_mask"]
    for name, more in {"ray": ["actors=2"], "inline": ["execution=inline"]}.items():
        cluster.run(config(*small, *dp, *more), tmp_path / name)
    assert_same_run(tmp_path / "ray", tmp_path / "inline")


def test_adapters_give_the_bits_of_inline(local_ray, tmp_path):
    small = [
        "model.name=mlp",
        "model.hidden=[12,10]",
        "adapter={name: lora, rank: 2, b_init: 0.01}",
        "cohort=3",
    ]
    for name, more in {"ray": ["actors=2"], "inline": ["execution=inline"]}.items():
        cluster.run(config(*small, "partition.clients=6", *more), tmp_path / name)
    assert_same_run(tmp_path / "ray", tmp_path / "inline")
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("ray", "inline")]
    assert files[0] == files[1]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own with room for 60 kB, and a function that gives it more."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60k", "sparsyfed-test", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root's rights")
    yield place, lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(local_ray, tmp_path, small_disk):
    disk, make_room = small_disk
    tiny = ["model.name=mlp", "model.hidden=[8]", "cohort=2", "rounds=28", "actors=1", "checkpoint_every=5"]
    says = r"disk/run/(rounds.jsonl|checkpoints/.*): No space left on device; make room on that disk"
    with pytest.raises(DiskError, match=says):
        cluster.run(config(*tiny), disk / "run")
    computed = len(RunFolder(disk / "run").rounds())
    assert 5 < computed < 28
    make_room()
    cluster.resume(disk / "run")
    cluster.run(config(*tiny, "execution=inline"), tmp_path / "inline")
    assert_same_run(disk / "run", tmp_path / "inline")


def talkative(input_shape, classes):
    """A model that is warned of, where it is built."""
    logging.getLogger("sparsyfed.test").warning("built in process %d", os.getpid())
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


def test_the_drivers_warnings_reach_who_follows_it(local_ray, tmp_path, caplog):
    name = f"model.name={__name__}:talkative"
    cluster.run(config(name, "cohort=1", "actors=1", "rounds=1"), tmp_path / "run")
    built = {record.getMessage() for record in caplog.records if "built in process" in record.getMessage()}
    assert len(built - {f"built in process {os.getpid()}"}) == 1


def test_an_actor_killed_while_it_trains_changes_nothing(local_ray, undisturbed, tmp_path):
    settings = config("actors=2")
    folder = RunFolder.create(tmp_path / "run", settings)
    federation = Federation.of(settings)
    engine = ray_engine(settings, federation)
    run, killed = engine.run, []

    def run_and_kill(broadcast, tasks, chunks, meanwhile):
        def kill_soon():
            # Work has just been handed out and a round takes seconds: the actor is training.
            threading.Timer(0.5, kill).start()
            meanwhile()

        def kill():
            killed.append(engine_pids.pop())
            os.kill(killed[-1], signal.SIGKILL)

        engine_pids = (
            [place.pid for place in engine.places()]
            if broadcast.instructions.round == 2 and not killed
            else []
        )
        return run(broadcast, tasks, chunks, kill_soon if engine_pids else meanwhile)

    engine.run = run_and_kill
    Driver(folder, federation, engine).run()
    engine.close()
    assert len(killed) == 1
    assert not psutil.pid_exists(killed[0])
    assert sum(line["time/lost_actors"] for line in folder.rounds()) >= 1
    assert_same_run(folder.path, undisturbed)


def test_masked_rounds_give_the_bits_of_plain_ones_though_an_actor_is_killed(local_ray, tmp_path):
    """Two actors, of which one dies in round 2, and clients that never answer; dense, then inside a mask."""
    small = [
        "model.name=small_cnn",
        "cohort=5",
        "partition.clients=8",
        "rounds=3",
        "algorithm={name: flash}",
    ]
    tiers = ["devices.tiers={all: {share: 1.0, dropout: 0.2}}"]
    masks = ["privacy.secure.masks=real", "privacy.secure.threshold=0.5"]
    for name, more in {"plain": [], "inline": masks}.items():
        cluster.run(config(*small, *tiers, *more, "execution=inline"), tmp_path / name)
    settings = config(*small, *tiers, *masks, "actors=2")
    folder, federation = RunFolder.create(tmp_path / "ray", settings), Federation.of(settings)
    engine = ray_engine(settings, federation)
    run = engine.run

    def run_and_kill(broadcast, tasks, chunks, meanwhile):
        def kill():
            os.kill(engine.pids()[0], signal.SIGKILL)
            meanwhile()

        return run(
            broadcast, tasks, chunks, kill if broadcast.instructions.round == 2 and tasks else meanwhile
        )

    engine.run = run_and_kill
    Driver(folder, federation, engine).run()
    engine.close()
    assert sum(line["time/lost_actors"] for line in folder.rounds()) == 1
    assert sum(line["secure/recovered"] for line in folder.rounds()) > 0
    assert_same_run(folder.path, tmp_path / "inline")
    models = {(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "inline", "ray")}
    assert len(models) == 1


def test_the_driver_killed_in_mid_run_resumes_to_the_same_bits(local_ray, undisturbed, tmp_path):
    folder = tmp_path / "run"

    def kill_the_driver():
        deadline = time.monotonic() + 120
        while not list(folder.glob("checkpoints/round-000001*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        # Of this test's own cluster: other runs on the machine are none of its business.
        for process in psutil.Process().children(recursive=True):
            if any("ray::DriverActor" in part for part in process.cmdline()):
                process.kill()

    killer = threading.Thread(target=kill_the_driver)
    killer.start()
    with pytest.raises(ClusterError, match="sparsyfed resume"):
        cluster.run(config("actors=2"), folder)
    killer.join()
    assert not (folder / "result.json").exists()
    cluster.resume(folder, ["actors=1"])
    assert_same_run(folder, undisturbed)
    assert json.loads((folder / "result.json").read_text())["complete"]


def test_actors_that_cannot_be_placed_name_asked_and_free(local_ray, tmp_path):
    settings = config("model.name=small_cnn")
    federation = Federation.of(settings)
    with pytest.raises(PlacementError, match=r"2 actors with 3 CPU .* free now: .*CPU.*4"):
        RayEngine(
            federation.setup(), federation.sizes, [Bundle(ActorKind("", 3), 1)] * 2, placement_timeout=5
        )


def test_a_failing_client_names_itself_and_keeps_its_traceback(local_ray, tmp_path):
    settings = config("model.name=tests.cluster.actors.test_ray:FailingModel", "actors=1")
    with pytest.raises(
        Exception, match=r"client \d+ failed in round 1, stage train.*planted failure"
    ) as raised:
        cluster.run(settings, tmp_path / "run")
    assert "test_ray.py" in str(raised.value)


def FailingModel(input_shape, classes):
    """A user's own model whose training forward raises."""
    from torch import nn

    class Failing(nn.Sequential):
        def forward(self, inputs):
            if self.training:
                raise ValueError("planted failure")
            return super().forward(inputs)

    return Failing(nn.Flatten(), nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], classes))
