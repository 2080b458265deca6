"""What all tests share: one thread, one small set of pictures, and a shell's way to run a command."""

import json
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from deltavit import cli

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


class Done(NamedTuple):
    """A command that has ended: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        """The last line of standard output, which must be one JSON object."""
        values = json.loads(self.out.splitlines()[-1])
        assert isinstance(values, dict)
        return values

    @property
    def line(self):
        """The one line of an error: nothing else on standard error, no traceback."""
        assert self.code == 1, self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("deltavit: ")
        return self.err.strip()


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command as a shell would, but in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["deltavit", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run
