"""scikit-learn's handwritten digits as picture files: a data set that needs no network."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ..core.errors import DataError

TRAIN, VAL = 200, 200


def write_digits(folder: Path) -> Path:
    """1,797 handwritten digits, 8 x 8, as train/val/test folders of PNG files: 200, 200 and 1,397; whole or not at all.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits come with scikit-learn: pip install 'deltavit[demo]'") from None
    if folder.is_dir():
        return folder
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".digits-", dir=folder.parent))
    for position, index in enumerate(order):
        split = "train" if position < TRAIN else "val" if position < TRAIN + VAL else "test"
        path = fresh / split / str(digits.target[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    fresh.chmod(0o755)
    try:
        fresh.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(fresh)
    return folder
