"""The local engine: worker processes that die, raise, take too much, or lose their parent."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from deltavit.bench import bench, read_suite
from deltavit.bench.engine import Local

SUITE = """
name = "colours"
seeds = [0]
[models.pico]
name = "vit_pico"
[data]
root = {root}
sets = [{name}]
workers = 0
[train]
epochs = {epochs}
batch_size = 8
[[methods]]
method = "lora"
[[methods]]
label = "broken"
method = "bitfit"
train = {{lr = 1e38, epochs = 1, clip = 1e38}}
"""


@pytest.fixture
def suite(pictures, tmp_path):
    def made(epochs=2):
        path = tmp_path / "colours.toml"
        path.write_text(
            SUITE.format(root=json.dumps(str(pictures.parent)), name=json.dumps(pictures.name), epochs=epochs)
        )
        return read_suite(path)

    return made


def finish(steps):
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return {record["method"]: record for record in end.value}


def servers(parent=None):
    """The worker processes of a suite."""
    children = psutil.Process(parent).children(recursive=True)
    return [p for p in children if "multiprocessing.spawn" in " ".join(p.cmdline())]


def under_way(out):
    return any(len(path.read_bytes().splitlines()) > 3 for path in (out / "runs").glob("*lora*/metrics.jsonl"))


def test_a_piece_that_raises_fails_alone_with_its_traceback(suite, tmp_path):
    records = finish(bench(suite(), tmp_path / "out", Local(1, threads=1)))
    assert records["lora"]["status"] == "done"
    broken = records["broken"]
    assert (broken["status"], broken["attempts"]) == ("failed", 1)
    assert "the loss is nan" in broken["error"]["line"]
    assert "core.errors.Diverged" in broken["error"]["traceback"]
    assert "fit.py" in broken["error"]["traceback"]
    assert not servers()


@pytest.mark.slow
@pytest.mark.parametrize(("times", "status"), [(1, "done"), (2, "failed")])
def test_a_worker_that_is_killed_is_tried_again_once(suite, tmp_path, times, status):
    killed, lines = [], []

    def kill():
        if len(killed) < times and under_way(tmp_path / "out"):
            (worker,) = servers()
            if worker.pid not in killed:
                worker.kill()
                killed.append(worker.pid)
        return False

    steps = bench(suite(2000 if times == 2 else 25), tmp_path / "out", Local(1, threads=1), only="*lora*", stop=kill,
                  say=lines.append)  # fmt: skip
    record = finish(steps)["lora"]
    assert (record["status"], record["attempts"]) == (status, 2)
    assert len(killed) == times
    assert ["SIGKILL" in line and "tried again" in line for line in lines] == [True]
    assert status == "done" or "SIGKILL" in record["error"]["line"]


@pytest.mark.slow
def test_a_worker_over_its_memory_fails_its_piece_alone(suite, tmp_path):
    limit = 200 * 2**20  # less than torch alone takes
    records = finish(bench(suite(), tmp_path / "out", Local(1, threads=1, memory=limit), only="*lora*"))
    record = records["lora"]
    assert (record["status"], record["attempts"]) == ("failed", 1)
    assert "GiB of memory, the limit is 0.2: raise --memory" in record["error"]["line"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(suite, tmp_path, number):
    suite(5000)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "deltavit", "bench", tmp_path / "colours.toml", "--out", out, "--threads", "1"],
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not under_way(out):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.1)
    workers = servers(process.pid)
    assert workers
    os.kill(process.pid, number)
    process.wait(15)
    _, alive = psutil.wait_procs(workers, timeout=15)
    assert not alive


def test_devices_are_given_to_the_workers_in_turn():
    assert Local(3, devices=["cuda:0", "cuda:1"])._places == ["cuda:0", "cuda:1", "cuda:0"]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Local(0)
