"""The Ray engine, on clusters of this machine that listen on the loopback address only."""

import json
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time

import psutil
import pytest

import deltavit
from deltavit.bench import bench, read_suite
from deltavit.bench import ray as engine
from deltavit.bench.engine import Local
from deltavit.bench.ray import Ray, _piece
from deltavit.core.errors import TrainingError
from deltavit.store import FolderLock

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # before Ray is imported: loopback only
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

SUITE = """
name = "colours"
seeds = [0, 1]
[models.pico]
name = "vit_pico"
[data]
root = {root}
sets = [{name}]
workers = 0
[train]
epochs = 12
batch_size = 8
[[methods]]
method = "lora"
[[methods]]
label = "broken"
method = "bitfit"
train = {{lr = 1e38, epochs = 1, clip = 1e38}}
space = {{"train.lr" = []}}
[search]
sampler = "grid"
epochs = 1
space = {{"train.lr" = [0.001, 0.01]}}
"""
OURS = ("seconds", "peak_bytes", "attempts", "device")  # of the machine and the moment, not of the result


@pytest.fixture(scope="module")
def suite(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "colours.toml"
    path.write_text(SUITE.format(root=json.dumps(str(pictures.parent)), name=json.dumps(pictures.name)))
    return read_suite(path)


@pytest.fixture(scope="module")
def alone(suite, tmp_path_factory):
    """The records of the local engine."""
    return finish(bench(suite, tmp_path_factory.mktemp("alone"), Local(1, threads=1)))[0]


@pytest.fixture(scope="module")
def cluster():
    """A head that works on nothing and two nodes of one processor."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    place = tempfile.mkdtemp(prefix="ray")  # a socket's path may have 107 letters
    plain = {"node_ip_address": "127.0.0.1", "object_store_memory": 80_000_000, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={**plain, "num_cpus": 0, "temp_dir": place})
    for _ in range(2):
        made.add_node(**plain, num_cpus=1)
    yield made
    made.shutdown()
    shutil.rmtree(place, ignore_errors=True)


def finish(steps, each=lambda: None):
    """The records and the outcomes of a suite."""
    outcomes = []
    while True:
        try:
            outcomes.append(next(steps))
            each()
        except StopIteration as end:
            return end.value, outcomes


def plain(records):
    return [
        {k: v for k, v in r.items() if k not in OURS} | ({"error": r["error"]["line"]} if r["error"] else {})
        for r in records
    ]


def listening(process):
    return {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


@pytest.mark.slow
def test_ray_gives_the_records_of_the_local_engine_and_leaves_nothing_running(suite, alone, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    heard = set()

    def look():
        heard.update(*(listening(p) for p in psutil.Process().children(recursive=True)))

    records, _ = finish(bench(suite, tmp_path, Ray("ray:local")), look)
    assert [r["status"] for r in records] == ["done", "failed"] * 2
    assert plain(records) == plain(alone)
    assert heard
    assert heard <= {"127.0.0.1", "::ffff:127.0.0.1"}
    _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=10)
    assert not [p for p in left if "ray" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_a_node_that_is_killed_loses_no_cell_and_counts_none_twice(suite, alone, cluster, tmp_path):
    victim = psutil.Process(next(iter(cluster.worker_nodes)).all_processes["raylet"][0].process.pid)
    killed, lines = [], []

    def kill():
        """Once a cell on the victim has taken some steps."""
        busy = [p for p in ([] if killed else victim.children(recursive=True)) if "_piece" in " ".join(p.cmdline())]
        if busy and any(map(trained, (tmp_path / "runs").glob("*/metrics.jsonl"))):
            killed.extend([victim, *victim.children(recursive=True)])
            for process in killed:
                process.kill()
        return False

    records, outcomes = finish(bench(suite, tmp_path, Ray(f"ray:{cluster.address}"), stop=kill, say=lines.append))
    assert killed
    assert ["its node or its process was lost" in line for line in lines] == [True]
    assert sorted(r["attempts"] for r in records) == [1, 1, 1, 2]
    assert sorted(o.key for o in outcomes if o.kind == "run") == sorted(r["key"] for r in records)
    assert plain(records) == plain(alone)  # the lost cell went on from its checkpoint, or from its beginning
    assert [len(r["test_reads"]) for r in records if r["status"] == "done"] == [1, 1]


def trained(metrics):
    return len(metrics.read_bytes().splitlines()) > 3


def test_a_node_without_the_suites_folder_works_in_one_of_its_own_and_sends_the_adapter_back(
    suite, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    cell = next(suite.cells())
    recipe = {**cell.spec()["recipe"], "train": {**cell.spec()["recipe"]["train"], "epochs": 1}}
    spec = {**cell.spec(), "recipe": recipe, "study": None, "keep_adapters": True}
    away, name = tmp_path / "elsewhere" / cell.key, secrets.token_hex(8)
    result, error, files = _piece(spec, {}, str(away), f"{name} {name}", 1, False, deltavit.__version__)
    assert error is None
    assert result["clean"]
    assert {"adapter.safetensors", "run.json", "recipe.toml", "metrics.jsonl"} <= set(files)
    assert not away.exists()
    own = tmp_path / f"deltavit-{name}"
    assert own.stat().st_mode & 0o777 == 0o700
    assert not list(own.iterdir())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_node_with_another_deltavit_is_refused(suite):
    cell = next(suite.cells())
    _, error, _ = _piece(cell.spec(), {}, "nowhere", "0 0", 1, True, "0.0.1")
    assert re.fullmatch(r"the node \S+ has deltavit \S+, the suite 0.0.1: install the same", error["line"])


def test_a_lock_that_outlives_its_process_for_a_moment_is_waited_for(tmp_path):
    lock = FolderLock(tmp_path)
    lock.__enter__()
    threading.Timer(0.5, lock.__exit__, (None, None, None)).start()
    began = time.monotonic()
    engine._wait_for(tmp_path)
    assert 0.4 < time.monotonic() - began < 10


@pytest.mark.parametrize("address", ["ray", "ray://host", "ray:host", "http://host:1", "auto"])
def test_what_is_no_address_of_a_cluster_is_refused(address):
    with pytest.raises(TrainingError, match="is no Ray cluster: ray://HOST:10001"):
        Ray(address)


@pytest.mark.parametrize("needs", [{"cpus": 0}, {"cpus": -1}, {"gpus": -1}])
def test_a_piece_takes_a_processor_or_a_gpu(needs):
    with pytest.raises(TrainingError, match="must take some processor or GPU"):
        Ray("ray:local", **needs)


@pytest.mark.parametrize("form", ["ray://127.0.0.1:{}", "ray:127.0.0.1:{}"])
def test_a_cluster_that_does_not_answer_is_told_at_once(form):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(TrainingError, match="no Ray cluster answers"), Ray(form.format(port)):
        pass


def test_without_ray_the_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(TrainingError, match=r"pip install 'deltavit\[ray\]'"), Ray("ray:auto"):
        pass


@pytest.mark.slow
def test_a_piece_that_no_node_can_hold_is_told_before_the_suite_begins(cluster, monkeypatch):
    monkeypatch.setattr(engine, "WAIT", 0)
    line = "no node of .* can hold a piece that takes 1 CPU, 2 GPU"
    with pytest.raises(TrainingError, match=line), Ray(f"ray:{cluster.address}", gpus=2):
        pass
