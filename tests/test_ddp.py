"""Two processes on one run: the same losses as one, one writer, and nothing that waits for ever."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

FIT = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
import deltavit
from deltavit import Images, Training, attach, evaluate, fit, load_model, method, open_data
from deltavit.data import Split
from deltavit.store import Checkpoints
from deltavit.train import ddp

data = open_data(sys.argv[1])
out = Path(sys.argv[2])
one_each = [0, 8, 16]
few = Split("few", tuple(data.train.paths[i] for i in one_each), (0, 1, 2))
alone = Split("alone", data.val.paths[:1], data.val.labels[:1])
PLAIN = dict(epochs=2, lr=5e-3, precision="fp32")
CASES = {
    "a last short batch": (data.train, data.val, dict(batch_size=8, mixup=0.4, label_smoothing=0.1, augment="light")),
    "accumulated": (data.train, data.val, dict(batch_size=7, accumulate=2)),
    "a rank without a picture": (few, alone, dict(batch_size=2)),
    "batches of one": (few, alone, dict(batch_size=1, optimizer="sgd")),
}
with ddp.group():
    found = {}
    for case, (train, val, more) in CASES.items():
        model = load_model("tiny")
        # another seed on the second rank: the first one's values count
        adapter = attach(model, method("lora"), classes=data.classes, seed=0 if case != "accumulated" else ddp.rank())
        pre = adapter.preprocessing
        checkpoints = Checkpoints(out / f"{case}, rank {ddp.rank()}")
        val = Images(val, pre, workers=0)
        steps = list(fit(model, adapter, Images(train, pre, workers=0), val, Training(**PLAIN, **more),
                         checkpoints=checkpoints))
        scores = evaluate(model, val, precision="fp32")
        sums = [t.double().sum().item() for t in adapter.tensors().values()]
        found[case] = dict(losses=[s.loss for s in steps], accuracies=[s.accuracy for s in steps],
                           scores={k: v for k, v in vars(scores).items() if k != "by_class"},
                           by_class=scores.by_class, sums=sums)
    (out / f"rank-{ddp.rank()}.json").write_text(json.dumps(found))
"""

WRAPPED = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from deltavit import attach, load_model, method

dist.init_process_group("gloo")
rank = dist.get_rank()
x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
y = torch.arange(8) % 3
found = {}
for name in ("lora", "full", "fact-tk", "bitfit"):
    model = load_model("tiny")
    base = {n: t.clone() for n, t in model.state_dict().items()}
    adapter = attach(model, method(name), classes=3)
    wrapped = DistributedDataParallel(model.train())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        mine = slice(4 * rank, 4 * rank + 4)
        loss = torch.nn.functional.cross_entropy(wrapped(x[mine]), y[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss := loss.detach())
        losses.append(loss.item() / dist.get_world_size())
    sums = [t.double().sum().item() for t in adapter.tensors().values()]
    adapter.detach()
    clean = all(torch.equal(t, base[n]) for n, t in model.state_dict().items()) and len(model.state_dict()) == len(base)
    found[name] = dict(losses=losses, sums=sums, clean=clean)
(Path(sys.argv[1]) / f"rank-{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(*words, processes=2):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"]
    start = [*torchrun, "--master-port", str(port())] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *start, *map(str, words)], capture_output=True, text=True, timeout=300, env=environment
    )


@pytest.fixture
def script(tmp_path):
    def write(text):
        (tmp_path / "script.py").write_text(text)
        return tmp_path / "script.py"

    return write


def test_two_processes_have_the_losses_of_one_and_only_the_first_writes(pictures, tmp_path, script):
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        done = launch(script(FIT), pictures, out, processes=processes)
        assert done.returncode == 0, done.stderr
        found[processes] = [json.loads((out / f"rank-{r}.json").read_text()) for r in range(processes)]
    (one,), (first, second) = found[1], found[2]
    for case, alone in one.items():
        for mine in (first[case], second[case]):
            assert mine["losses"] == pytest.approx(alone["losses"], abs=1e-5), case
            assert mine["sums"] == pytest.approx(alone["sums"], abs=1e-4), case
            assert mine["accuracies"] == alone["accuracies"], case
            assert mine["scores"] == pytest.approx(alone["scores"], abs=1e-5), case
            assert mine["by_class"] == pytest.approx(alone["by_class"], abs=1e-5), case
        assert first[case]["sums"] == second[case]["sums"], case
        assert list((tmp_path / "2" / f"{case}, rank 0").glob("checkpoint-*"))
        assert not (tmp_path / "2" / f"{case}, rank 1").exists()


def test_the_command_line_under_torchrun_makes_the_run_of_one_process(pictures, tmp_path):
    program = tmp_path / "main.py"
    program.write_text("import torch; torch.set_num_threads(1)\nfrom deltavit.cli import main\nmain()\n")
    words = [program, "train", "--data", pictures, "--model", "tiny", "--device", "cpu", "--epochs", "2", "--json"]
    words += ["train.batch_size=8", "train.precision=fp32", "data.workers=0"]
    results = {}
    for processes in (1, 2):
        done = launch(*words, "--out", tmp_path / f"run-{processes}", processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1, "one result, of the first process"
        assert done.stderr.count("epoch   1") == 1
        results[processes] = json.loads(done.stdout)
    rows = [
        [json.loads(line) for line in (tmp_path / f"run-{n}" / "metrics.jsonl").read_text().splitlines()]
        for n in (1, 2)
    ]
    assert [r["loss"] for r in rows[1]] == pytest.approx([r["loss"] for r in rows[0]], abs=1e-5)
    assert [r.get("accuracy") for r in rows[1]] == [r.get("accuracy") for r in rows[0]]
    assert results[2]["test_accuracy"] == results[1]["test_accuracy"]
    done = launch(*words, "--out", tmp_path / "run-2", "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == results[2]


def test_torchs_own_ddp_trains_an_attached_model_and_leaves_the_base(tmp_path, script):
    done = launch(script(WRAPPED), tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in range(2))
    assert first == second, "gradients are the same on both"
    for name, mine in first.items():
        assert mine["losses"][-1] < mine["losses"][0], name
        assert mine["clean"], name
