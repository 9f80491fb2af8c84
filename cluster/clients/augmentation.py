"""Random changes of a batch of images in training: a crop out of a black margin, a mirror image.

What is drawn for a step depends on (seed, round, client, step) alone, so that it is the same whoever plays
the client, after a resume, and in every pass that a method makes over one batch. The draws are a few numbers
an image, made on the host; the pixels are gathered on the device, outside of what a CUDA graph records.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.workload.inputs import to_input


@dataclass(frozen=True)
class Augmentation:
    """How images are changed, and what black is.

    Attributes:
        crop: Pixels of margin around an image, out of which its own size is cut at a random place.
        flip: Whether an image is mirrored, left to right, with probability 1/2.
        black: What the margin holds, as a model input.
    """

    crop: int
    flip: bool
    black: float

    @classmethod
    def of(cls, crop: int, flip: bool, stored: np.dtype) -> Augmentation | None:
        """The changes of images that are stored as some type; None where there are none.

        Of pixels black is what a stored 0 becomes; of numbers it is 0.
        """
        if not crop and not flip:
            return None
        return cls(crop, flip, float(to_input(np.zeros(1, stored), torch.device("cpu"))))

    def apply(self, images: Tensor, key: int, step: int) -> Tensor:
        """Other images of the same shape.

        Args:
            images: Model inputs [B, C, H, W].
            key: What the client's draws of a round begin with, see ``cluster.seeding``.
            step: Number of the local step.
        """
        batch, channels, height, width = images.shape
        rng = np.random.default_rng([key, step])
        corners = rng.integers(0, 2 * self.crop + 1, (2, batch))
        rows = np.arange(height) + corners[0][:, None]
        columns = np.arange(width) + corners[1][:, None]
        if self.flip:
            mirrored = rng.integers(0, 2, batch, dtype=bool)
            columns[mirrored] = columns[mirrored, ::-1]
        device = images.device
        down, across = (torch.from_numpy(each).to(device) for each in (rows, columns))
        padded = F.pad(images, (self.crop,) * 4, value=self.black)
        which = torch.arange(batch, device=device)[:, None, None, None]
        colour = torch.arange(channels, device=device)[None, :, None, None]
        return padded[which, colour, down[:, None, :, None], across[:, None, None, :]]
