"""The demo suite as a user runs it: through the command line, killed, resumed, reported."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def deltavit(*arguments):
    command = [sys.executable, "-m", "deltavit", *map(str, arguments)]
    return {"args": command, "cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}


def records(out):
    return {p.name: json.loads(p.read_text()) for p in (out / "records").glob("*.json")}


def test_the_demo_suite_is_killed_resumed_and_reported(tmp_path):
    out = tmp_path / "out"
    suite = [ROOT / "recipes" / "demo-suite.toml", f"data.root={tmp_path / 'data'}", "--out", out]
    running = subprocess.Popen(
        **deltavit("bench", *suite, "--workers", 2, "--threads", 1), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 400
    while len(records(out)) < 3 and time.monotonic() < until and running.poll() is None:
        time.sleep(0.2)
    kept = records(out)
    assert len(kept) >= 3, running.communicate()[1][-2000:]
    workers = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive

    again = subprocess.run(
        **deltavit("bench", *suite, "--workers", 2, "--threads", 1, "--json"), capture_output=True, timeout=600
    )
    assert again.returncode == 0, again.stderr[-2000:]
    told = json.loads(again.stdout.splitlines()[-1])
    assert (told["done"], told["failed"]) == (8, 0)
    whole = records(out)
    assert len(whole) == 8
    assert {name: whole[name] for name in kept} == kept
    ended = [line for line in again.stderr.splitlines() if "  test " in line]
    assert len(ended) == 8 - len(kept)
    assert all(r["clean"] and r["status"] == "done" and len(r["test_reads"]) == 1 for r in whole.values())
    means = {r["method"]: r["test_accuracy"] for r in whole.values() if r["seed"] == 0}
    assert means["linear probing"] > 0.7
    assert max(means.values()) > 0.85

    for to in ("one", "two"):
        told = subprocess.run(
            **deltavit("report", out, "--to", tmp_path / to, "--json"), capture_output=True, timeout=200
        )
        assert told.returncode == 0, told.stderr[-2000:]
    files = {p.name for p in (tmp_path / "one").iterdir()}
    assert {"index.md", "index.html", "table.tex", "runs.csv", "accuracy-body.png"} <= files
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in files)


def test_a_suite_that_is_asked_to_stop_leaves_what_lets_it_go_on(tmp_path):
    suite = [ROOT / "recipes" / "demo-suite.toml", f"data.root={tmp_path / 'data'}", "--out", tmp_path / "out"]
    running = subprocess.Popen(
        **deltavit("bench", *suite, "--threads", 1), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 200
    while not list((tmp_path / "out").rglob("checkpoint-*")) and time.monotonic() < until:
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130, said
    assert "the same command continues it: deltavit bench" in said
    assert "Traceback" not in said
