"""A model of one's own: ``model.name=tests.example_model:strided_cnn`` (the README's Fashion-MNIST table)."""

from torch import nn


def strided_cnn(*, input_shape: tuple[int, int, int], classes: int, hidden: int = 448) -> nn.Module:
    """Two strided convolutions and two linear layers: 212,000 weights and 1.9 MFLOP on 28x28 images.

    Every layer has about the same fan-in, so that a global top-K empties none of them.

    Args:
        input_shape: (channels, height, width).
        classes: Number of logits.
        hidden: Width of the hidden layer.
    """
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 32, 3, stride=2, padding=1),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding=1),
        nn.GroupNorm(8, 48),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(48 * 9, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )
