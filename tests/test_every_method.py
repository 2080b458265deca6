"""What every method keeps, beyond the contract: long training, half precision, two processes."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from families import FAMILIES
from torch.nn import functional as F

import deltavit
from deltavit.core.contract import pictures, stir

SMALL = {
    "fact-tt": {"rank": 4}, "fact-tk": {"rank": 4}, "kadaptation": {"n": 4, "rank": 2}, "fastfood": {"dimension": 8},
    "vpt-deep": {"tokens": 2}, "vpt-shallow": {"tokens": 2}, "adaptformer": {"rank": 4}, "adapterdrop": {"rank": 4},
    "compacter": {"rank": 4}, "arc": {"rank": 4}, "vera": {"rank": 8},
}  # fmt: skip


def small(name):
    return deltavit.method(name, **SMALL.get(name, {}))


@pytest.mark.parametrize("name", deltavit.methods())
def test_100_steps_with_weight_decay_leave_the_base_to_the_bit(name):
    model = FAMILIES["tiny"]()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adapter = deltavit.attach(model, small(name), classes=5)
    stir(adapter)
    x, y = pictures(model, 8), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    adapter.detach()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", deltavit.methods())
def test_merging_in_half_precision_stays_within_its_rounding(name, dtype):
    """Logits of the merged model agree with the attached one's to 2e-2 in bf16 and 2e-3 in fp16, of their largest."""
    model = deltavit.load_model("vit_pico").to(dtype)
    adapter = deltavit.attach(model, small(name), classes=5)
    if not adapter.mergeable:
        pytest.skip("adds layers")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        for p in adapter.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
        x = pictures(model, 64).to(dtype)
        attached = model.eval()(x).float()
        adapter.merge()
        gap = (model(x).float() - attached).abs().max() / attached.abs().max()
    assert gap <= {torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype], gap


TWO = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import deltavit
from deltavit.core.contract import pictures
from deltavit.train import ddp
options = json.loads(sys.argv[2])
found = {}
with ddp.group():
    for name in deltavit.methods():
        model = deltavit.load_model("tiny")
        adapter = deltavit.attach(model, deltavit.method(name, **options.get(name, {})), classes=5)
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
        x, y = pictures(model, 8), torch.arange(8) % 5
        mine = slice(4 * ddp.rank(), 4 * ddp.rank() + 4)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(wrapped(x[mine]), y[mine]).backward()
            optimizer.step()
        with torch.no_grad():
            found[name] = model.eval()(x).double().tolist()
    (Path(sys.argv[1]) / f"{ddp.rank()}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_torchs_ddp_on_two_processes_trains_every_method_as_one_process_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, tmp_path, json.dumps(SMALL)],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for name in deltavit.methods():
        model = FAMILIES["tiny"]()
        adapter = deltavit.attach(model, small(name), classes=5)
        x, y = pictures(model, 8), torch.arange(8) % 5
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            alone = model.eval()(x).double()
        assert found[0][name] == found[1][name], name
        torch.testing.assert_close(torch.tensor(found[0][name]).double(), alone, atol=1e-4, rtol=1e-4, msg=name)
