"""From a picture to the numbers that the model reads.

Letters: B pictures, s the side of the square that the model takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..core.errors import DataError, unknown
from ..core.site import Preprocessing
from .sampler import draws

AUGMENTATIONS = ("none", "flip", "light")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


def to_tensor(image: Image.Image, pre: Preprocessing) -> Tensor:
    """An RGB picture resized as `pre` says: uint8 [3, s, s].

    `crop` cuts and resizes in one step: the centre square with `pre.crop` of the short side.  That is the usual "resize
    the short side to s / crop, then cut the centre" without its rounding, and without its cost on a very long picture.

    Raises:
        DataError: an interpolation or a way to resize that does not exist.
    """
    if pre.interpolation not in INTERPOLATIONS:
        raise DataError(unknown("interpolation", pre.interpolation, INTERPOLATIONS))
    if pre.resize not in ("squash", "crop"):
        raise DataError(unknown("way to resize", pre.resize, ("squash", "crop")))
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    if pre.resize == "crop":
        side = min(width, height) * pre.crop
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    small = image.resize((pre.size, pre.size), Image.Resampling[pre.interpolation.upper()], box)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def normalise(batch: Tensor, pre: Preprocessing) -> Tensor:
    """uint8 [B, 3, s, s] to float32, (x / 255 - mean) / std, on the device of the batch."""
    mean = torch.tensor(pre.mean, device=batch.device).view(3, 1, 1)
    std = torch.tensor(pre.std, device=batch.device).view(3, 1, 1)
    return batch.to(torch.float32).div_(255).sub_(mean).div_(std)


def augment(batch: Tensor, name: str = "none", *, seed: int, epoch: int, indices: Sequence[int]) -> Tensor:
    """Random variants of training pictures, uint8 [B, 3, s, s] to the same shape.

    `none` changes nothing; `flip` mirrors left and right every second time; `light` also shifts by up to s / 8 either
    way, mirrored at the border.  The choices for a picture follow from (seed, epoch, its index in the split) alone, so
    they survive a resume and any number of processes.

    Raises:
        DataError: no augmentation of that name.
    """
    if name not in AUGMENTATIONS:
        raise DataError(unknown("augmentation", name, AUGMENTATIONS))
    if name == "none":
        return batch
    side = batch.shape[-1]
    reach = side // 8 if name == "light" else 0
    chosen = np.array([draws(seed, epoch, index) for index in indices]).reshape(-1, 4)
    down, right = (chosen[:, :2] % (2 * reach + 1)).astype(np.int64).T - reach
    flipped = (chosen[:, 2] % 2).astype(bool)

    at = np.arange(side)
    rows = _mirrored(at + down[:, None], side)
    columns = _mirrored(at + right[:, None], side)
    columns[flipped] = columns[flipped, ::-1]
    out = torch.empty_like(batch)
    for i, picture in enumerate(batch):
        row, column = torch.from_numpy(rows[i]).to(batch.device), torch.from_numpy(columns[i]).to(batch.device)
        out[i] = picture.index_select(1, row).index_select(2, column)
    return out


def _mirrored(at: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    """Positions outside 0 .. side - 1 reflected into it, the border itself not doubled."""
    return np.asarray(side - 1 - np.abs(side - 1 - np.abs(at)))
