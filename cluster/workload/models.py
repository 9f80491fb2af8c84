"""Models by name, initialised from a seed alone.

Every model is plain torch: float32 images [B, C, H, W] in, logits [B, classes] out. Layers are found by their
names (`fnmatch` patterns such as `*shortcut*`), activations are never changed in place because methods save
them, and nothing depends on the batch but BatchNorm.

    model = build("resnet18", input_shape=(3, 32, 32), classes=10, seed=1, norm="group")
"""

import inspect
import itertools
import math
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from cluster.references import UserError, did_you_mean, load_reference
from cluster.workload.objectives import Objective, check_objective

# Standard deviation of a standard normal cut at two sigma: dividing by it restores the variance asked for.
TRUNCATED_NORMAL_DEVIATION = 0.87962566103423978


class ModelError(UserError):
    """An impossible model; the message names the model or option, what was found and what is allowed."""


def build(name: str, *, input_shape: tuple[int, ...], classes: int, seed: int, **options: Any) -> nn.Module:
    """Build a model on the CPU whose weights depend on the arguments alone.

    Args:
        name: A key of `MODELS`, or a user's `module:attribute`, called with `input_shape`, `classes` and the
            options. A user's model keeps its own initialisation, drawn under `seed`; the others get
            `initialise`.
        input_shape: Shape of one sample: (channels, height, width) of an image.
        classes: Number of outputs, of classes one logit each.
        seed: Seed of the weights. torch's global generator is left as it was found.
        options: Keyword arguments of the builder.

    Raises:
        ModelError: An unknown name or option, or a value that the model cannot have.
    """
    own = ":" in name
    if not own and name not in MODELS:
        raise ModelError(
            f"model.name = {name!r} is unknown; allowed are {', '.join(sorted(MODELS))} or your own "
            f"'module:attribute'{did_you_mean(name, MODELS)}"
        )
    builder = load_reference("model.name", name, ModelError) if own else MODELS[name]
    parameters = inspect.signature(builder).parameters
    allowed = [key for key in parameters if key not in ("input_shape", "classes")]
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        for option in options:
            if option not in allowed:
                raise ModelError(
                    f"model.{option} is no option of {name!r}; allowed are {', '.join(allowed) or 'none'}"
                    f"{did_you_mean(option, allowed)}"
                )
    # torch.manual_seed would also reseed every GPU, which this fork does not restore.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model = builder(input_shape=tuple(input_shape), classes=classes, **options)
        except TypeError as error:
            raise ModelError(f"model: {name} cannot be built with {options}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model.name = {name!r} returned {type(model).__name__}, not a torch.nn.Module")
    if not own:
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
    Normalisations: weight 1, bias 0, running statistics as new. Anything else keeps its values.

    Args:
        model: The model, on any device.
        seed: Seed of a generator of its own; no global generator is read or changed.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            sigma = math.sqrt(1.0 / module.weight[0].numel()) / TRUNCATED_NORMAL_DEVIATION
            # Drawn on the CPU, so that the device does not matter.
            drawn = torch.empty(module.weight.shape)
            nn.init.trunc_normal_(drawn, 0.0, sigma, -2 * sigma, 2 * sigma, generator=generator)
            with torch.no_grad():
                module.weight.copy_(drawn)
                if module.bias is not None:
                    module.bias.zero_()
        elif isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
            module.reset_parameters()


def _check_widths(option: str, widths: Sequence[int]) -> None:
    if any(width < 1 for width in widths):
        raise ModelError(f"model.{option} = {list(widths)}; every width must be at least 1")


def _norm(kind: str, channels: int, groups: int) -> nn.Module:
    """The normalisation of a convolution's output."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "none":
        return nn.Identity()
    if kind != "group":
        raise ModelError(
            f"model.norm = {kind!r} is unknown; allowed are group, batch, none"
            f"{did_you_mean(kind, ('group', 'batch', 'none'))}"
        )
    if groups < 1 or channels % groups:
        raise ModelError(f"model.groups = {groups} does not divide a layer's {channels} channels")
    return nn.GroupNorm(groups, channels)


def small_cnn(
    *,
    input_shape: tuple[int, int, int],
    classes: int,
    channels: Sequence[int] = (64, 128),
    hidden: int = 256,
    norm: str = "group",
    groups: int = 8,
) -> nn.Module:
    """Two blocks of convolution, normalisation, ReLU and 2x2 max-pooling, then two linear layers.

    What the blocks leave is averaged to at most 2x2, so that the model has about 208,000 parameters (on
    one-channel 8x8 digits as on 28x28 clothes) and not 1.7 million. Neither the norm nor the kind of
    pooling matters much for speed: on one core the convolutions take four fifths of a step.

    Args:
        input_shape: (channels, height, width), at least 4x4.
        classes: Number of logits.
        channels: Output channels of the two convolutions.
        hidden: Width of the hidden linear layer.
        norm: `group`, `batch` or `none`.
        groups: Groups of GroupNorm; must divide the channels.
    """
    depth, height, width = input_shape
    if min(height, width) < 4:
        raise ModelError(f"model.name = 'small_cnn' needs at least 4x4 pixels, images have {height}x{width}")
    if len(channels) != 2:
        raise ModelError(f"model.channels = {list(channels)} of 'small_cnn'; two numbers are needed")
    _check_widths("channels", channels)
    _check_widths("hidden", [hidden])
    first, second = channels
    kept = (min(2, height // 4), min(2, width // 4))
    layers: list[nn.Module] = []
    for before, after in ((depth, first), (first, second)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=norm == "none"),
            _norm(norm, after, groups),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    if kept != (height // 4, width // 4):
        layers.append(nn.AdaptiveAvgPool2d(kept))
    flat = second * kept[0] * kept[1]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, arXiv 1512.03385).

    The shortcut is the identity, or a 1x1 convolution with a normalisation where the shape changes; then its
    convolution is called `shortcut.0`, for name patterns such as `*shortcut*`.
    """

    def __init__(self, before: int, after: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = norm(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), norm(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, before, H, W] to [B, after, H/stride, W/stride]."""
        residual = functional.relu(self.norm1(self.conv1(x)))
        residual = self.norm2(self.conv2(residual))
        return functional.relu(residual + self.shortcut(x))


class ResNet18(nn.Module):
    """See `resnet18`."""

    def __init__(
        self, depth: int, classes: int, stem: str, width: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(depth, width, 7, stride=2, padding=3, bias=False)
            self.pool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(depth, width, 3, padding=1, bias=False)
            self.pool = nn.Identity()
        self.norm1 = norm(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for stage in (1, 2, 3, 4):
            stride = 1 if stage == 1 else 2
            blocks = [
                BasicBlock(widths[stage - 1], widths[stage], stride, norm),
                BasicBlock(widths[stage], widths[stage], 1, norm),
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to logits [B, classes]."""
        x = self.pool(functional.relu(self.norm1(self.conv1(x))))
        for stage in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean(dim=(2, 3)))


def resnet18(
    *,
    input_shape: tuple[int, int, int],
    classes: int,
    norm: str = "batch",
    groups: int = 2,
    stem: str = "cifar",
    width: int = 64,
) -> nn.Module:
    """ResNet-18: 11.17 million parameters for ten classes of CIFAR.

    Args:
        input_shape: (channels, height, width).
        classes: Number of logits.
        norm: `batch` (the papers'), `group` or `none`.
        groups: Groups of GroupNorm; must divide the channels.
        stem: `cifar`: a 3x3 convolution and no pooling. `imagenet`: 7x7 with stride 2 and a 3x3 max-pool with
            stride 2, as in the original and in the Speech Commands experiments.
        width: Channels of the first stage; the later ones have 2, 4 and 8 times as many.
    """
    if stem not in ("cifar", "imagenet"):
        raise ModelError(
            f"model.stem = {stem!r} is unknown; allowed are cifar, imagenet"
            f"{did_you_mean(stem, ('cifar', 'imagenet'))}"
        )

    _check_widths("width", [width])
    return ResNet18(input_shape[0], classes, stem, width, lambda channels: _norm(norm, channels, groups))


def mlp(*, input_shape: tuple[int, int, int], classes: int, hidden: Sequence[int] = (200,)) -> nn.Module:
    """Linear layers with ReLU between them, on flattened images.

    Args:
        input_shape: (channels, height, width).
        classes: Number of logits.
        hidden: Widths of the hidden layers; empty for a linear classifier.
    """
    _check_widths("hidden", hidden)
    sizes = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


MODELS: dict[str, Callable[..., nn.Module]] = {"small_cnn": small_cnn, "resnet18": resnet18, "mlp": mlp}
