"""The scripts beside the package run: pretraining of the backbone, the speed harness."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deltavit

ROOT = Path(deltavit.__file__).parents[1]


def pictures(folder, classes, count, size):
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / str(label)).mkdir(parents=True)
        for i in range(count):
            noise = rng.integers(0, 80, (size, size, 3)) + 40 * label
            Image.fromarray(noise.astype(np.uint8)).save(folder / str(label) / f"{i}.png")


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_pretraining_script_makes_weights_that_load(tmp_path):
    pictures(tmp_path / "train", 100, 3, 32)
    out = tmp_path / "pico.safetensors"
    printed = run(
        ROOT / "tools/pretrain_pico.py", "--images", tmp_path, "--out", out, "--epochs", 1, "--batch", 64,
        "--held-out", 50,
    )  # fmt: skip
    assert "epoch 1 of 1" in printed
    model = deltavit.load_model("vit_pico", out)
    assert deltavit.anatomy(model).fingerprint != deltavit.anatomy(deltavit.load_model("vit_pico")).fingerprint


@pytest.mark.slow
def test_the_speed_harness_prints_ratios(tmp_path):
    pytest.importorskip("peft")
    printed = run(
        ROOT / "benchmarks/speed.py", "--models", "vit_tiny_patch16_224", "--rounds", 2, "--batch", 1,
        "--device", "cpu", "--only", "lora all,LoRA all", "--no-memory", "--json", tmp_path / "speed.json",
    )  # fmt: skip
    rows = json.loads((tmp_path / "speed.json").read_text())["vit_tiny_patch16_224"]
    assert set(rows) == {"frozen limit", "lora all r8", "PEFT LoRA all r8"}
    assert "over the limit" in printed
