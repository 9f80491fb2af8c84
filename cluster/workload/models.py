"""Models by name, initialised from a seed alone.

Every model is plain torch: float32 images [B, C, H, W] in, logits [B, classes] out; of text tokens int64 [B,
T] in, logits [B, T, vocabulary] out. Layers are found by their names (`fnmatch` patterns such as
`*shortcut*`), activations are never changed in place because methods save them, and nothing depends on the
batch but BatchNorm.

    model = build("resnet18", input_shape=(3, 32, 32), classes=10, seed=1, norm="group")
"""

import math
import os
import traceback
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.configuration.choices import build_choice
from cluster.references import UserError
from cluster.workload.architecture import Architecture
from cluster.workload.objectives import Objective, check_objective

# Standard deviation of a standard normal cut at two sigma: dividing by it restores the variance asked for.
TRUNCATED_NORMAL_DEVIATION = 0.87962566103423978


class ModelError(UserError):
    """An impossible model; the message names the model or option, what was found and what is allowed."""


def build(
    name: str, *, input_shape: tuple[int, ...], classes: int, seed: int, tokens: int = 0, **options: Any
) -> nn.Module:
    """Build a model on the CPU whose weights depend on the arguments alone.

    Args:
        name: What `model.name` may be. A user's model keeps its own initialisation, drawn under `seed`; the
            others get `initialise`.
        input_shape: Shape of one sample: (channels, height, width) of an image.
        classes: Number of outputs, of classes one logit each.
        tokens: How many tokens there are, where the inputs are a text's: `vocabulary` of what takes it.
        seed: Seed of the weights. torch's global generator is left as it was found.
        options: Fields of the architecture, or keyword arguments of a user's function.

    Raises:
        ChoiceError: An unknown name or option, or a value that no model can have.
        ModelError: It does not fit the input, or is no module.
    """
    architecture: Architecture = build_choice("model", name, options)
    # torch.manual_seed would also reseed every GPU, which this fork does not restore.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model = architecture.built(tuple(input_shape), classes, tokens)
        except ModelError:
            raise
        except (TypeError, ValueError) as error:
            images = "" if len(input_shape) == 3 else "; mlp and linear take tables, transformers text"
            shape = list(input_shape)
            raise ModelError(
                f"model: {name} cannot be built with {options} for inputs {shape}: {error}{images}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model.name = {name!r} returned {type(model).__name__}, not a torch.nn.Module")
    if architecture.initialised_here:
        initialise(model, seed)
    return model


def check_model(
    model: nn.Module, name: str, inputs: torch.Tensor, targets: np.ndarray, objective: Objective, count: int
) -> None:
    """Train a model for half a step, to find before the first round what would end or spoil training.

    Args:
        model: The plain model, on the CPU; it is left as it was.
        name: ``model.name``, for messages.
        inputs: Model inputs of a few samples, [B, ...].
        targets: Their targets, [B, ...].
        objective: What is learned.
        count: Outputs for each target.

    Raises:
        ModelError: Nothing is trained, the inputs do not pass, what comes out is nothing that training could
            improve, or the objective fails on it.
    """
    place, shape = f"model.name = {name!r}", list(inputs.shape)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError(f"{place} has no parameter that is trained (requires_grad)")
    was_training = model.training
    try:
        # What the model draws at random must not shift what is drawn later.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            outputs = model.eval()(inputs)
    except Exception as error:  # whatever a model of one's own does
        steps = traceback.extract_tb(error.__traceback__)[1:]
        line = next((s for s in reversed(steps) if f"{os.sep}torch{os.sep}" not in s.filename), steps[-1])
        raise ModelError(
            f"{place} fails on inputs of shape {shape}: {type(error).__name__}: "
            f"{' '.join(str(error).split())} ({line.filename}, line {line.lineno})"
        ) from error
    finally:
        model.train(was_training)
    expected = objective.shape(targets, count)
    wanted = f"expected float32 {list(expected)}: {objective.outputs_are.format(count=count)}"
    if not isinstance(outputs, torch.Tensor):
        raise ModelError(f"{place} returns a value of type {type(outputs).__name__}; {wanted}")
    kind = str(outputs.dtype).removeprefix("torch.")
    found = f"{place} returns {kind} {list(outputs.shape)} for inputs {shape}"
    if not objective.fits(tuple(outputs.shape), expected) or not outputs.is_floating_point():
        raise ModelError(f"{found}; {wanted}")
    if not outputs.isfinite().all():
        wrong = outputs[~outputs.isfinite()][0].item()
        raise ModelError(f"{place} returns {wrong} for inputs {shape} before any training")
    if not outputs.requires_grad:
        raise ModelError(
            f"{place}: what it returns depends on none of its parameters; nothing can be learned"
        )
    check_objective(objective, outputs, torch.from_numpy(np.array(targets)))


def initialise(model: nn.Module, seed: int) -> None:
    """Draw the weights of a model anew, in place, in the order of its modules.

    Convolutions and linear layers: a normal distribution cut at two sigma with variance 1/fan_in, biases 0;
    sigma is sqrt(1/fan_in) / 0.8796, which makes up for the cut (the SparsyFed authors' initialisation).
    Embeddings: the same with variance 1/width. Normalisations: weight 1, bias 0, running statistics as new.
    Anything else keeps its values.

    Args:
        model: The model, on any device.
        seed: Seed of a generator of its own; no global generator is read or changed.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding)):
            sigma = math.sqrt(1.0 / module.weight[0].numel()) / TRUNCATED_NORMAL_DEVIATION
            # Drawn on the CPU, so that the device does not matter.
            drawn = torch.empty(module.weight.shape)
            nn.init.trunc_normal_(drawn, 0.0, sigma, -2 * sigma, 2 * sigma, generator=generator)
            with torch.no_grad():
                module.weight.copy_(drawn)
                if not isinstance(module, nn.Embedding) and module.bias is not None:
                    module.bias.zero_()
        elif isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
            module.reset_parameters()
