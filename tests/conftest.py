"""What all tests share: one thread, and one small set of pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # sums in one order, and fair to whoever shares the machine

CLASSES = ("blue", "green", "red")
COUNTS = {"train": (8, 8, 6), "val": (2, 2, 3), "test": (3, 2, 2)}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """train/val/test folders of three classes, 22 + 7 + 7 pictures of 20 x 18, which their colours tell apart."""
    root = tmp_path_factory.mktemp("pictures")
    numbers = np.random.default_rng(0)
    for split, counts in COUNTS.items():
        for channel, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = numbers.integers(0, 120, (18, 20, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 100
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root
