"""What cuts leave of adapters and of a trained head: it is told before anything starts."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import cluster
from cluster.federation import Federation
from tests.cluster.test_adapters import LORA, MLP, adapted
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def base(cache, tmp_path):
    file = tmp_path / "base.safetensors"
    save_file(Federation.of(tiny_federation(cache, model=MLP, seed=7)).model.state_dict(), file)
    return str(file)


HEAD, FREEZE_HEAD, FREEZE_A = "% of the trained head", {"freeze_head": True}, {"freeze_a": True}


#: 256 weights are prunable: of A 128 in +-1/8 and 24 in +-.29, of B 44, of the head 30 in +-.32.
@pytest.mark.parametrize(
    ("method", "adapter", "says"),
    [
        ({"name": "topk", "sparsity": 0.95}, {}, HEAD + ".*freeze_head=true.* and nothing of 1.lora_A and 3"),
        (
            {"name": "sparsyfed", "sparsity": 0.95},
            {"b_init": 0.01},
            HEAD + ".* nothing of 1.lora_A and 3 more",
        ),
        ({"name": "topk"}, FREEZE_HEAD, r"leave nothing of 1.lora_B and 1 more layers .*freeze_a=true"),
        ({"name": "topk"}, FREEZE_A, HEAD + ".* nothing of 1.lora_B and 1 more layers"),
        ({"name": "fixed_mask", "layer_density": "uniform"}, {}, "fixed_mask at .* leave 10" + HEAD),
        ({"name": "flasc", "down_sparsity": 0.95}, {}, HEAD),
        ({"name": "sparsyfed"}, {"b_init": 0.01} | FREEZE_HEAD | FREEZE_A, None),
        ({"name": "topk"}, FREEZE_HEAD | FREEZE_A, None),
        ({"name": "fixed_mask"}, FREEZE_HEAD, None),
        ({"name": "flasc", "down_sparsity": 0.0}, {}, None),
        ({"name": "fedef"}, {}, None),
    ],
)
def test_what_the_first_cut_would_take_is_told(cache, base, method, adapter, says):
    method = {"sparsity": 0.9, **method}
    model = {**MLP, "weights": base}
    config = adapted(cache, model=model, algorithm=method, adapter={**LORA, **adapter})
    federation = Federation.of(config)
    told = federation.trained.lost_to_a_cut(config, federation.layout)
    if says is None:
        assert told is None
    else:
        assert re.search(says, told), told
        assert "\n" not in told


def test_a_run_that_cannot_learn_says_so_and_the_base_stays_as_it_was(cache, base, tmp_path, caplog):
    """SparsyFed cuts all of B, whose weights never come back: what is evaluated is the base, bit for bit."""
    config = adapted(
        cache,
        rounds=2,
        model={**MLP, "weights": base},
        algorithm={"name": "sparsyfed", "sparsity": 0.9},
        adapter={**LORA, "b_init": 0.001, "freeze_head": True},
    )
    with caplog.at_level("WARNING", logger="sparsyfed"):
        result = cluster.run(config, tmp_path / "run")
    assert "leave nothing of 1.lora_B and 1 more layers" in caplog.text
    merged, begun = load_file(tmp_path / "run" / "model.safetensors"), load_file(base)
    assert all(torch.equal(merged[name], begun[name]) for name in begun)
    assert result.summary["sparsity"] == pytest.approx(0.9, abs=0.01)


def test_without_the_trained_a_and_head_sparsyfed_moves_the_model(cache, base, tmp_path):
    config = adapted(
        cache,
        rounds=2,
        model={**MLP, "weights": base},
        algorithm={"name": "sparsyfed", "sparsity": 0.5},
        adapter={**LORA, "b_init": 0.05, "freeze_head": True, "freeze_a": True},
    )
    run = run_inline(config, tmp_path / "run")
    assert set(run.weights) == {"1.lora_B.weight", "3.lora_B.weight"}
    assert all(torch.count_nonzero(own) for own in run.weights.values())
    left = run.state.weights != 0
    assert (run.state.weights[left] != run.states[0].weights[left]).all()
