"""The slow check itself, on a narrow model and a stand-in of CIFAR-10."""

import pytest

from tests.cluster import workloads
from tests.golden import resnet18

NARROW = ["model.width=4", "partition.clients=8", "cohort=1"]
#: Convolutions, shortcuts and the linear layer of ResNet-18 with 4, 8, 16, 32 channels, times what they see.
STEM, FIRST = 3 * 4 * 9, 4 * 4 * 4 * 9
SECOND, THIRD, FOURTH = (c // 2 * c * 9 + 3 * c * c * 9 + c // 2 * c for c in (8, 16, 32))
PRUNABLE = STEM + FIRST + SECOND + THIRD + FOURTH + 32 * 10
#: Scale and shift of the norms (stem and 4 a stage, one more with a shortcut), and the linear layer's bias.
OTHERS = 2 * (5 * 4 + 5 * (8 + 16 + 32)) + 10


@pytest.fixture
def check(monkeypatch, tmp_path, cache):
    """Runs the check of SparsyFed against such a log."""
    data = workloads.cifar10(tmp_path / "cifar10")
    small = [*NARROW, f"data.cache={cache}"]
    monkeypatch.setattr(resnet18, "overrides", lambda *given, of=resnet18.overrides: [*of(*given), *small])

    def run(sparsity, within):
        monkeypatch.setitem(resnet18.LOGGED, "sparsyfed", resnet18.Logged(sparsity, within))
        arguments = ["--data", str(data), "--output", str(tmp_path / "runs"), "--methods", "sparsyfed"]
        return resnet18.main(arguments)

    return run


@pytest.mark.usefixtures("no_pictures")
def test_zeros_of_all_parameters_are_compared_with_the_log(check, capsys):
    """One client a round, so that the global model has exactly the client's K prunable weights."""
    expected = 100 * (1 - (round(0.05 * PRUNABLE) + OTHERS) / (PRUNABLE + OTHERS))
    assert check((expected,), (1e-9,)) == 0
    assert f"round 1: {expected:.2f} %" in capsys.readouterr().out
    # The run is there: the same command only compares.
    assert check((expected - 0.5,), (0.4,)) == 1
    assert "round 1 done" not in (out := capsys.readouterr().out)
    assert f"authors {expected - 0.5:.2f} %, difference +0.50, allowed 0.40  TOO FAR" in out


def test_a_folder_without_data_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        resnet18.main(["--data", str(tmp_path)])
    assert f"--data {tmp_path}: no train-*.parquet in it" in capsys.readouterr().err
