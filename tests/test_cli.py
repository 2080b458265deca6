"""The command line: one job in one process, results on standard output, everything else on standard error."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import timm
import torch

import deltavit
from deltavit import cli
from deltavit.core.file import info
from deltavit.data import Images
from deltavit.store import FolderLock

TRAINED = {
    "test_accuracy", "val_accuracy", "trainable_parameters", "head_parameters", "adapter", "adapter_bytes", "seconds",
    "seed", "fingerprint",
}  # fmt: skip
SMALL = ["--model", "tiny", "--epochs", "3", "--device", "cpu", "train.batch_size=8", "data.workers=0"]


def command(*words, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, "-c", "from deltavit.cli import main; main()", *map(str, words)]
    return subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A finished run of lora on tiny, made once; tests look at it and copy it."""
    out = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["deltavit", "train", "--data", str(pictures), "--out", str(out), *SMALL])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code
    return out


# --- train -----------------------------------------------------------------------------------------------------------


def test_train_makes_a_run_of_a_folder(run, pictures, tmp_path):
    done = run("train", "--data", pictures, "--out", tmp_path / "run", *SMALL, "--json")
    assert done.code == 0
    assert set(done.json) >= TRAINED
    assert done.out.count("\n") == 1
    assert "epoch   3" in done.err
    kept = {path.name for path in (tmp_path / "run").iterdir()} - {"curves.png", ".lock"}
    assert kept == {"recipe.toml", "metrics.jsonl", "adapter.safetensors", "run.json", "test-reads.jsonl"}
    assert json.loads((tmp_path / "run" / "run.json").read_text()).items() >= done.json.items()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert ["accuracy" in row for row in rows] == [False, False, True] * 3
    assert done.json["adapter_bytes"] == (tmp_path / "run" / "adapter.safetensors").stat().st_size
    assert (done.json["trainable_parameters"], done.json["head_parameters"], done.json["seed"]) == (2304, 75, 0)


def test_without_json_a_person_reads_a_name_and_a_value_a_line(run, trained):
    done = run("train", "--resume", "--out", trained)
    assert done.code == 0
    assert "is complete already" in done.err
    assert done.out.splitlines()[0].split() == ["test_accuracy", done.out.split()[1]]


def test_flags_changes_and_a_recipe_make_the_same_adapter(run, pictures, tmp_path):
    flags = run("train", "--data", pictures, "--out", tmp_path / "flags", *SMALL, "--lr", "0.01", "method.rank=2")
    (tmp_path / "r.toml").write_text(
        f'[model]\nname = "tiny"\n[method]\nname = "lora"\nrank = 2\n[data]\npath = "{pictures}"\n'
        "[train]\nepochs = 3\nlr = 0.5\nbatch_size = 8\n"
    )
    file = run("train", "--recipe", tmp_path / "r.toml", "--out", tmp_path / "file", "train.lr=0.01", "device=cpu")
    assert flags.code == file.code == 0
    one, two = ((tmp_path / name / "adapter.safetensors").read_bytes() for name in ("flags", "file"))
    assert one == two
    again = run("train", "--recipe", tmp_path / "file" / "recipe.toml", "--out", tmp_path / "again")
    assert again.code == 0
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == one


def test_a_run_folder_is_used_once_and_a_changed_recipe_does_not_resume_it(run, trained, pictures):
    before = (trained / "run.json").read_bytes()
    assert "already holds a run: --resume" in run("train", "--data", pictures, "--out", trained, *SMALL).line
    line = run("train", "--resume", "--out", trained, "--lr", "0.5").line
    assert "train.lr = 0.001, not 0.5" in line
    assert (trained / "run.json").read_bytes() == before


def test_a_wrong_path_leaves_no_run_behind(run, tmp_path, pictures):
    assert "nowhere" in run("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "run", *SMALL).line
    assert run("train", "--data", pictures, "--out", tmp_path / "run", *SMALL, "--epochs", "1").code == 0


def test_a_folder_that_another_process_owns_is_refused(run, pictures, tmp_path):
    with FolderLock(tmp_path / "run"):
        line = run("train", "--data", pictures, "--out", tmp_path / "run", *SMALL).line
    assert f"in use by process {os.getpid()}" in line
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_a_run_stopped_by_ctrl_c_says_how_to_go_on_and_ends_in_the_same_bytes(run, pictures, tmp_path, monkeypatch):
    words = ["--data", pictures, *SMALL, "train.mixup=0.4", "method.dropout=0.1"]
    assert run("train", *words, "--out", tmp_path / "whole").code == 0
    from deltavit.train import fit as function

    fitting = sys.modules[function.__module__]
    real, count = fitting._step, []

    def step(*args, **options):
        count.append(1)
        if len(count) in (1, 5, 9):  # the first, one inside an epoch, the very last
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(fitting, "_step", step)
    out = tmp_path / "a part"
    stopped = run("train", *words, "--out", out)
    for _ in range(3):
        assert stopped.code == 130
        last = stopped.err.splitlines()[-1]
        assert last == f"stopped; continue with: deltavit train --resume --out '{out}'"
        assert not (out / "adapter.safetensors").exists()
        stopped = run("train", "--resume", "--out", out)
    assert stopped.code == 0
    assert len(count) == 9
    for name in ("adapter.safetensors", "recipe.toml"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    one, two = (
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (f / "metrics.jsonl").open()]
        for f in (out, tmp_path / "whole")
    )
    assert one == two


@pytest.mark.slow
def test_in_processes_of_their_own_one_of_two_wins_and_sigint_leaves_a_resumable_run(run, pictures, tmp_path):
    out = tmp_path / "run"
    words = ["--data", pictures, "--model", "tiny", "--device", "cpu", "data.workers=0", "train.batch_size=2"]
    words += ["--epochs", "40", "train.precision=fp32"]
    both = [command("train", *words, "--out", out, "--json") for _ in range(2)]
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while all(p.poll() is None for p in both):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    loser = next(p for p in both if p.poll() is not None)
    winner = next(p for p in both if p is not loser)
    said, line = loser.communicate(timeout=60)
    if loser.returncode == 0:
        pytest.skip("the first was done before the second began")
    assert loser.returncode == 1
    assert "in use by process" in line or "already holds a run" in line
    assert json.loads(said) == {"error": line.strip().removeprefix("deltavit: ")}
    winner.send_signal(signal.SIGINT)
    said, messages = winner.communicate(timeout=60)
    assert winner.returncode == 130, messages
    assert said == ""
    assert messages.splitlines()[-1] == f"stopped; continue with: deltavit train --resume --out {out}"
    assert "Traceback" not in messages
    assert list(out.glob("checkpoint-*.safetensors"))
    again = command("train", "--resume", "--out", out, "--json")
    said, messages = again.communicate(timeout=120)
    assert again.returncode == 0, messages
    assert set(json.loads(said)) >= TRAINED
    assert run("train", *words, "--out", tmp_path / "whole").code == 0
    whole = (tmp_path / "whole" / "adapter.safetensors").read_bytes()
    assert (out / "adapter.safetensors").read_bytes() == whole


# --- evaluate and predict --------------------------------------------------------------------------------------------


def test_evaluate_says_again_what_training_said(run, trained, pictures):
    said = json.loads((trained / "run.json").read_text())
    for split, key in (("test", "test_accuracy"), ("val", "val_accuracy")):
        done = run("evaluate", "--adapter", trained, "--data", pictures, "--split", split, "--device", "cpu", "--json")
        assert done.json["accuracy"] == said[key]
        assert done.json["pictures"] == 7
    assert "no split 'tset'" in run("evaluate", "--adapter", trained, "--data", pictures, "--split", "tset").line


def test_evaluate_cuts_a_folder_of_classes_as_training_did(run, pictures, tmp_path):
    out = tmp_path / "run"
    words = [*SMALL, "data.seed=3", "data.val=0.2", "data.test=0.3"]
    assert run("train", "--data", pictures / "train", "--out", out, *words).code == 0
    said = json.loads((out / "run.json").read_text())
    shutil.copy(out / "adapter.safetensors", tmp_path / "moved.safetensors")
    done = run("evaluate", "--adapter", tmp_path / "moved.safetensors", "--data", pictures / "train", "--json")
    assert done.json["pictures"] == said["data"]["test"]["size"] == 7
    assert done.json["accuracy"] == said["test_accuracy"]


def test_evaluate_refuses_classes_that_the_adapter_does_not_know(run, trained, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "more")
    for split in ("train", "val", "test"):
        shutil.copytree(tmp_path / "more" / split / "red", tmp_path / "more" / split / "violet")
    assert "was not trained on: violet" in run("evaluate", "--adapter", trained, "--data", tmp_path / "more").line


def test_predict_takes_files_and_folders_and_says_what_it_cannot_read(run, trained, pictures, tmp_path):
    folder = tmp_path / "[red]some :cat:"
    folder.mkdir()
    shutil.copy(pictures / "test" / "red" / "0.png", folder / "b.png")
    (folder / "a.png").write_bytes(b"no picture")
    one = pictures / "test" / "blue" / "1.png"
    words = ["predict", one, folder, "--adapter", trained / "adapter.safetensors", "--device", "cpu"]
    done = run(*words, "--json", "--top", "2")
    assert done.code == 1
    assert done.json["broken"] == 1
    first, broken, last = done.json["predictions"]
    assert [p["path"] for p in (first, broken, last)] == [str(one), str(folder / "a.png"), str(folder / "b.png")]
    assert "is not a JPEG, PNG, WebP, BMP or TIFF" in broken["error"]
    assert [len(p["classes"]) for p in (first, last)] == [2, 2]
    assert "1 of 3 pictures could not be read" in done.err
    table = run(*words).out
    assert "[red]some :cat:" in table.replace("\n", "")
    assert run("predict", one, "--adapter", trained, "--json").code == 0
    assert "does not exist" in run("predict", tmp_path / "none.png", "--adapter", trained).line


# --- methods, plan, doctor -------------------------------------------------------------------------------------------


def test_methods_lists_every_method_with_its_count(run):
    done = run("methods", "--model", "tiny", "--classes", "3", "--json")
    rows = {row["name"]: row for row in done.json["methods"]}
    assert set(rows) == set(deltavit.methods())
    model = deltavit.load_model("tiny")
    for name, row in rows.items():
        assert row["trainable_parameters"] == deltavit.plan(model, deltavit.method(name)).trainable_parameters
        assert row["head_parameters"] == 75
    shown = run("methods", "--model", "tiny")
    assert shown.code == 0
    assert all(name in shown.out for name in rows)


def test_plan_counts_without_weights(run):
    done = run(
        "plan", "--model", "vit_base_patch16_224", "--method", "lora", "--classes", "10", "method.rank=16", "--json"
    )
    assert done.code == 0
    assert set(done.json) >= {"trainable_parameters", "head_parameters", "mergeable", "sites"}
    assert (done.json["trainable_parameters"], done.json["head_parameters"]) == (589_824, 7_690)
    assert done.json["mergeable"] is True
    assert len(done.json["sites"]) == 24
    assert "blocks.2.v" in run("plan", "--model", "tiny").out


def test_doctor_names_versions_devices_and_faults(run):
    done = run("doctor", "--json")
    assert done.code == (1 if done.json["faults"] else 0)
    assert done.json["versions"]["torch"] == torch.__version__
    assert done.json["devices"][0].startswith("cpu")


# --- merge -----------------------------------------------------------------------------------------------------------


def saved_lora(path, classes, **options):
    """A LoRA on random vit_tiny, moved and saved; pictures, and its logits for them."""
    base = deltavit.load_model("vit_tiny_patch16_224", "random")
    adapter = deltavit.attach(base, deltavit.method("lora", **options), classes=classes)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    adapter.save(path)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return x, base.eval()(x)


def test_a_merged_file_loads_in_plain_timm_and_gives_the_same_logits(run, pictures, tmp_path):
    name, out = "vit_tiny_patch16_224", tmp_path / "merged.safetensors"
    data = deltavit.open_data(pictures)
    x, expected = saved_lora(tmp_path / "a.safetensors", data.classes)
    words = ["merge", "--adapter", tmp_path / "a.safetensors", "--weights", "random", "--out", out]
    done = run(*words, "--json")
    assert done.code == 0, done.err
    assert done.json["classes"] == list(data.classes)
    assert done.json["bytes"] == out.stat().st_size
    plain = timm.create_model(name, pretrained=False, num_classes=3)
    plain.load_state_dict(safetensors.torch.load_file(out), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), expected, rtol=0, atol=1e-5)
    before = out.stat().st_mtime_ns
    assert "exists: choose another --out" in run(*words).line
    assert out.stat().st_mtime_ns == before
    assert run(*words, "--overwrite").code == 0
    assert out.stat().st_mtime_ns > before


# --- export ----------------------------------------------------------------------------------------------------------


def test_export_to_peft_and_back_keeps_the_logits(run, pictures, tmp_path):
    peft = pytest.importorskip("peft")
    name = "vit_tiny_patch16_224"
    x, expected = saved_lora(tmp_path / "a.safetensors", deltavit.open_data(pictures).classes, rank=3)
    out = ["--weights", "random"]
    done = run("export", "--adapter", tmp_path / "a.safetensors", "--out", tmp_path / "peft", *out, "--json")
    assert done.code == 0, done.err
    plain = timm.create_model(name, pretrained=False, num_classes=3)
    fresh = deltavit.load_model(name, "random").state_dict()
    plain.load_state_dict({k: v for k, v in fresh.items() if not k.startswith("head")}, strict=False)
    there = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(there(x), expected, rtol=0, atol=1e-5)
    back = ["export", "--adapter", tmp_path / "peft", "--to", "deltavit", "--out", tmp_path / "b.safetensors", *out]
    assert "give --model" in run(*back).line
    done = run(*back, "--model", name, "--json")
    assert done.code == 0, done.err
    again = deltavit.load_model(name, "random")
    deltavit.load(tmp_path / "b.safetensors", again)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), expected, rtol=0, atol=1e-5)
    assert "exists: choose another --out" in run(*back, "--model", name).line
    assert "choose the other --to" in run("export", "--adapter", tmp_path / "peft", "--out", tmp_path / "c").line
    assert "choose the other --to" in run(*back[:2], tmp_path / "a.safetensors", *back[3:]).line


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "lorra"], "did you mean 'lora'?"),
        (["method.rnk=2"], "did you mean 'rank'?"),
        (["--model", "vit_pcio"], "did you mean 'vit_pico'?"),
        (["--model", "resnet18"], "not a Vision Transformer"),
        (["train.lrr=1"], "did you mean 'lr'?"),
        (["train.lr"], "is not key=value"),
        (["--data", "no/where"], "no/where"),
        (["--data", ""], "no data"),
        (["--recipe", "no.toml"], "cannot read the recipe no.toml"),
        (["--device", "cdua"], "device = 'cdua'"),
        (["--device", "cuda:77"], "device = 'cuda:77'"),
        (["--image-size", "0"], "model.image_size = 0"),
        (["--lr", "1e30", "train.warmup=0", "train.precision=fp32", "--method", "full"], "lower train.lr"),
        (["--weights", "no.safetensors", "--model", "vit_pico"], "no weights at no.safetensors"),
    ],
)
def test_an_error_of_train_is_one_line_with_the_way_out(run, words, says, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("train", "--data", pictures, "--out", "run", *SMALL, *words, "--json")
    assert done.code == 1
    line = done.err.splitlines()[-1]
    assert line.startswith("deltavit: ")
    assert says in line
    assert "Traceback" not in done.err
    assert done.json == {"error": line.removeprefix("deltavit: ")}


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_weights_that_are_a_pickle_are_never_opened(run, kind, pictures, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    path = tmp_path / "weights.bin"
    path.write_bytes(pickle.dumps(Bomb())) if kind == "pickle" else torch.save({"a": torch.ones(1)}, path)
    line = run("train", "--data", pictures, "--model", "vit_pico", "--weights", path, "--out", tmp_path / "run").line
    assert "deltavit never opens pickles" in line


def test_without_a_network_the_missing_weights_are_one_line(run, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    words = ["--model", "vit_tiny_patch16_384.augreg_in21k_ft_in1k", "--out", tmp_path / "run"]
    line = run("train", "--data", pictures, *words).line
    assert "could not be fetched" in line
    assert "give a local file" in line


def test_an_adapter_on_the_wrong_base_names_both(run, trained, pictures):
    words = ["--adapter", trained, "--model", "vit_pico", "--data", pictures]
    done = run("evaluate", *words, "--json")
    assert "was trained on tiny" in done.json["error"]
    assert "this model is vit_pico" in done.json["error"]
    assert done.code == 1


def test_a_file_that_is_no_adapter_is_one_line(run, tmp_path, pictures):
    (tmp_path / "a.safetensors").write_bytes(b"\x80\x04 a pickle")
    for adapter in (tmp_path / "a.safetensors", tmp_path / "none.safetensors", tmp_path):
        assert run("evaluate", "--adapter", adapter, "--data", pictures).line


@pytest.mark.slow
def test_a_process_keeps_results_and_messages_apart_and_exits_1_on_an_error(pictures, tmp_path):
    good = command("train", "--data", pictures, "--out", tmp_path / "run", *SMALL, "--json")
    bad = command("plan", "--method", "lorra", "--json")
    out, err = good.communicate(timeout=120)
    assert good.returncode == 0, err
    assert set(json.loads(out)) >= TRAINED
    assert "epoch   1" in err
    out, err = bad.communicate(timeout=120)
    assert bad.returncode == 1
    assert err.count("\n") == 1
    assert json.loads(out) == {"error": err.strip().removeprefix("deltavit: ")}


def test_the_adapter_of_a_run_is_whole_for_the_library_too(trained, pictures):
    said = info(trained / "adapter.safetensors")
    model = deltavit.load_model(said.base)
    adapter = deltavit.load(said.path, model)
    images = Images(deltavit.open_data(pictures).test, adapter.preprocessing)
    assert deltavit.evaluate(model, images).accuracy == said.training["test_accuracy"]
