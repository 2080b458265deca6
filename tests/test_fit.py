"""`fit` and `evaluate`: what is promised of a training run, on a model of a few thousand numbers."""

import copy
import dataclasses
import itertools
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import deltavit
from deltavit import Images, Training, attach, evaluate, fit, load_model, method, methods, predict
from deltavit.core.errors import AdapterError, DataError, Diverged, TrainingError
from deltavit.data import Split, decode, normalise, order, to_tensor
from deltavit.store import Checkpoints
from deltavit.train.evaluate import native_bf16
from deltavit.train.fit import _mixup

CPU = torch.device("cpu")
PLAIN = Training(epochs=2, batch_size=8, lr=5e-3, precision="fp32")
FULL = Training(
    epochs=3, batch_size=8, lr=5e-3, head_lr=1e-2, weight_decay=0.1, warmup=0.25, accumulate=2, mixup=0.4,
    label_smoothing=0.1, augment="light",
)  # fmt: skip
"""Everything on: 3 steps an epoch, the last of 6 pictures in two parts, 3 steps of warm-up."""


@pytest.fixture(scope="module")
def data(pictures):
    return deltavit.open_data(pictures)


class Watched(Images):
    """Images that remember which of them were asked for."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.asked = []

    def batch(self, indices):
        self.asked.append([int(i) for i in indices])
        return super().batch(indices)


class Run:
    """A fresh model, adapter and data, as in a process just started."""

    def __init__(self, data, training=PLAIN, name="lora", classes=None, split=None, checkpoints=None, **options):
        dropout = {"dropout": 0.1} if any(f.name == "dropout" for f in dataclasses.fields(methods()[name])) else {}
        self.model = load_model("tiny")
        self.adapter = attach(self.model, method(name, **{**dropout, **options}), classes=classes or data.classes)
        self.train = Watched(data.train if split is None else split, self.adapter.preprocessing, workers=0)
        self.training, self.checkpoints = training, checkpoints

    def steps(self, **more):
        return fit(self.model, self.adapter, self.train, None, self.training, checkpoints=self.checkpoints, **more)

    def losses(self, count=None, **more):
        """Of the first `count` steps, after which the caller stops."""
        steps = self.steps(**more)
        found = [step.loss for step in itertools.islice(steps, count)]
        steps.close()
        return found

    def bits(self):
        return {name: t.detach().numpy().tobytes() for name, t in self.adapter.tensors().items()}


def checkpointed(data, folder, training, name, **options):
    return Run(data, training, name, checkpoints=Checkpoints(folder), **options)


def subset(data, count):
    """The first pictures of train, in an order that mixes the classes."""
    chosen = sorted(range(len(data.train)), key=lambda i: data.train.paths[i].name)[:count]
    return Split("some", tuple(data.train.paths[i] for i in chosen), tuple(data.train.labels[i] for i in chosen))


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", methods())
def test_a_run_stopped_anywhere_ends_bit_equal_to_one_never_stopped(data, tmp_path, name, optimizer):
    training = dataclasses.replace(FULL, optimizer=optimizer)
    whole = Run(data, training, name)
    expected = whole.losses()
    losses, asked = [], []
    for stop in (0, 1, 3, 5, 8, None):  # at once, in warm-up, at an epoch's end, in its middle, before the last step
        part = checkpointed(data, tmp_path, training, name)
        losses += part.losses(None if stop is None else stop - len(losses))
        asked += part.train.asked
    assert losses == expected
    assert asked == whole.train.asked
    assert part.bits() == whole.bits()


@pytest.mark.parametrize("name", ["lora", "fact-tk"])
def test_a_killed_run_goes_on_from_its_newest_checkpoint_to_the_same_bits(data, tmp_path, name):
    whole = Run(data, FULL, name)
    expected = whole.losses()
    killed = checkpointed(data, tmp_path, FULL, name)
    steps = killed.steps()
    for _ in range(5):  # one and a half epochs; it is never closed
        next(steps)
    again = checkpointed(data, tmp_path, FULL, name)
    assert again.losses() == expected[3:]
    assert again.bits() == whole.bits()


def test_a_torn_newest_checkpoint_costs_its_steps_and_nothing_else(data, tmp_path):
    whole = Run(data, FULL)
    expected = whole.losses()
    checkpointed(data, tmp_path, FULL, "lora").losses(5, every=0)
    newest, older = sorted(tmp_path.glob("checkpoint-*"), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-100])
    again = checkpointed(data, tmp_path, FULL, "lora")
    assert again.losses() == expected[int(older.stem[-3:]) :]
    assert again.bits() == whole.bits()
    assert older.stem.endswith("4")


def test_a_finished_run_has_nothing_left_to_do(data, tmp_path):
    first = checkpointed(data, tmp_path, PLAIN, "lora")
    first.losses()
    again = checkpointed(data, tmp_path, PLAIN, "lora")
    assert again.losses() == []
    assert again.bits() == first.bits()


def test_sgd_without_momentum_resumes_too(data, tmp_path):
    training = dataclasses.replace(PLAIN, optimizer="sgd", momentum=0.0)
    whole = Run(data, training)
    expected = whole.losses()
    assert checkpointed(data, tmp_path, training, "lora").losses(4) == expected[:4]
    again = checkpointed(data, tmp_path, training, "lora")
    assert again.losses() == expected[4:]
    assert again.bits() == whole.bits()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"training": dataclasses.replace(PLAIN, lr=0.1)}, "lr = 0.005, now 0.1"),
        ({"training": dataclasses.replace(PLAIN, epochs=3)}, "epochs = 2, now 3"),
        ({"name": "lora-fix"}, "name = 'lora', now 'lora-fix'"),
        ({"rank": 4}, "rank = 8, now 4"),
        ({"classes": ["a", "b", "c", "d"]}, "classes was 3, now 4"),
        ({"split": "other"}, "data was"),
        ({"meta": {"note": 2}}, "note was 1, now 2"),
        ({"base": True}, "base was"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_by_the_key_that_differs(data, tmp_path, change, names):
    checkpointed(data, tmp_path, PLAIN, "lora").losses(2, meta={"note": 1})
    if change.get("split"):
        change = {"split": dataclasses.replace(data.train, labels=(*data.train.labels[:-1], 0))}
    meta, base = change.pop("meta", {"note": 1}), change.pop("base", False)
    other = Run(data, **{"training": PLAIN, "name": "lora", **change}, checkpoints=Checkpoints(tmp_path))
    if base:
        other.adapter.vit.fingerprint = "0" * 64
    before = other.bits()
    with pytest.raises(TrainingError, match="another run") as refused:
        other.losses(meta=meta)
    assert names in str(refused.value)
    assert "\n" not in str(refused.value)
    assert other.bits() == before


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", methods())
def test_a_checkpoint_holds_what_trains_and_the_optimizers_slots(data, tmp_path, name, optimizer):
    run = checkpointed(data, tmp_path, dataclasses.replace(PLAIN, optimizer=optimizer), name)
    run.losses(1)
    trains = sum(p.numel() * p.element_size() for p in run.adapter.parameters())
    slots = {"adamw": 2, "sgd": 1}[optimizer]
    _, tensors, _ = run.checkpoints.latest()
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    steps = 4 * len(run.adapter.parameters()) if optimizer == "adamw" else 0  # AdamW counts its steps for each tensor
    assert held == trains * (1 + slots) + steps
    assert run.checkpoints.path(1).stat().st_size <= trains * (1 + slots) + 64 * 1024


# --- determinism -----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_seed_another(data):
    one, same, other = (Run(data, dataclasses.replace(FULL, seed=seed)) for seed in (3, 3, 4))
    losses = one.losses()
    assert same.losses() == losses
    assert same.bits() == one.bits()
    assert other.losses() != losses


@pytest.mark.parametrize("name", ["full", "kadaptation"])
def test_two_runs_taking_turns_in_one_process_share_nothing(data, name):
    alone = Run(data, FULL, name), Run(data, dataclasses.replace(FULL, seed=1), "kadaptation")
    expected = [run.losses() for run in alone]
    together = Run(data, FULL, name), Run(data, dataclasses.replace(FULL, seed=1), "kadaptation")
    pairs = [(one.loss, two.loss) for one, two in zip(*(run.steps() for run in together), strict=True)]
    assert [list(losses) for losses in zip(*pairs, strict=True)] == expected
    assert [run.bits() for run in together] == [run.bits() for run in alone]


def test_the_callers_random_state_is_left_as_it_was(data):
    def states():
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().numpy().tobytes(), (kind, keys.tobytes(), *rest), random.getstate()

    before = states()
    run = Run(data, FULL)
    assert states() == before, "load_model or attach"
    run.losses()
    assert states() == before, "fit"
    images = Images(data.val, run.adapter.preprocessing)
    evaluate(run.model, images)
    list(predict(run.model, data.val.paths, data.classes, images.preprocessing))
    assert states() == before, "evaluate or predict"


def test_what_the_caller_draws_between_steps_changes_nothing(data):
    expected = Run(data, FULL).losses()
    losses = []
    for step in Run(data, FULL).steps():
        losses.append(step.loss)
        torch.manual_seed(len(losses))
        np.random.seed(len(losses))
    assert losses == expected


# --- the base --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "optimizer"), [*((name, "adamw") for name in methods()), ("full", "sgd")])
def test_the_base_is_bit_equal_after_a_hundred_steps_with_weight_decay(data, name, optimizer):
    training = dataclasses.replace(
        PLAIN, epochs=100, batch_size=22, weight_decay=0.5, optimizer=optimizer, momentum=0.9, lr=1e-3
    )
    model = load_model("tiny")
    before = copy.deepcopy(model.state_dict())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    adapter = attach(model, method(name), classes=data.classes)
    born = {n: t.detach().clone() for n, t in adapter.tensors().items()}
    assert len(list(fit(model, adapter, Images(data.train, adapter.preprocessing), None, training))) == 100
    still = {n for n, t in adapter.tensors().items() if torch.equal(t, born[n])}
    assert all(n.endswith(".k.bias") for n in still), "all trains but the bias of k, which softmax cannot see"
    adapter.detach()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixup", [0.0, 0.4])
@pytest.mark.parametrize("accumulate", [2, 4, 9])
def test_accumulating_changes_the_memory_and_not_the_losses(data, accumulate, mixup):
    training = dataclasses.replace(PLAIN, mixup=mixup, label_smoothing=0.1, augment="light", clip=0.5)
    whole = Run(data, training, dropout=0.0).losses()
    parts = Run(data, dataclasses.replace(training, accumulate=accumulate), dropout=0.0).losses()
    assert parts == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 21, 22, 1000])
def test_any_batch_size_sees_every_picture_once_an_epoch(data, batch_size):
    run = Run(data, dataclasses.replace(PLAIN, batch_size=batch_size, epochs=2))
    losses = run.losses()
    assert len(losses) == 2 * math.ceil(22 / batch_size)
    assert all(map(math.isfinite, losses))
    assert list(itertools.chain(*run.train.asked)) == [*order(0, 0, 22), *order(0, 1, 22)]


def test_one_picture_a_class_is_enough_to_train_on(data):
    split = Split("one each", tuple(data.train.paths[i] for i in (0, 8, 16)), (0, 1, 2))
    losses = Run(data, dataclasses.replace(PLAIN, epochs=30, batch_size=2, lr=1e-2), split=split).losses()
    assert losses[-1] < losses[0]


def test_no_picture_and_a_class_beyond_the_head_are_refused(data):
    with pytest.raises(DataError, match="no pictures"):
        Run(data, split=subset(data, 0)).losses()
    with pytest.raises(DataError, match="class number 2, but the head has 2 classes"):
        Run(data, classes=["a", "b"]).losses()


def test_training_learns_to_tell_colours_apart(data):
    run = Run(data, dataclasses.replace(PLAIN, epochs=20, lr=1e-2))
    images = Images(data.val, run.adapter.preprocessing)
    steps = list(fit(run.model, run.adapter, run.train, images, run.training))
    assert [s.accuracy is not None for s in steps] == [False, False, True] * 20
    assert steps[-1].accuracy == evaluate(run.model, images, precision="fp32").accuracy == 1.0
    assert [(s.epoch, s.step, s.steps) for s in steps[:4]] == [(0, 1, 60), (0, 2, 60), (0, 3, 60), (1, 4, 60)]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_checkpoint_of_it(data, tmp_path):
    run = checkpointed(data, tmp_path, dataclasses.replace(PLAIN, clip=None, epochs=4), "full")
    steps = run.steps()
    for _ in range(4):
        next(steps)
    with torch.no_grad():
        run.adapter.tensors()["norm.weight"][0] = math.nan
    with pytest.raises(Diverged, match=r"the loss is nan at epoch 2, step 5 of 12: lower train\.lr"):
        next(steps)
    assert not run.model.training
    step, tensors, _ = Checkpoints(tmp_path).latest()
    assert step == 3
    assert all(t.isfinite().all() for t in tensors.values())


def test_a_learning_rate_that_blows_up_is_named(data, tmp_path):
    run = checkpointed(data, tmp_path, dataclasses.replace(PLAIN, lr=1e30, warmup=0.0), "full")
    with pytest.raises(Diverged, match=r"step 2 of 6: lower train\.lr \(now 1e\+30\)"):
        run.losses()
    assert Checkpoints(tmp_path).latest() is None


@pytest.mark.parametrize("stop", [None, 2])
def test_a_step_that_ends_in_nan_is_neither_yielded_as_an_epoch_nor_saved(data, tmp_path, stop):
    run = checkpointed(data, tmp_path, dataclasses.replace(PLAIN, batch_size=11), "lora")
    steps = run.steps()
    next(steps)
    with torch.no_grad():
        run.adapter.head.bias.fill_(math.nan)
    with pytest.raises(Diverged, match=r"head\.bias is not finite|the loss is nan"):
        next(steps) if stop is None else steps.close()
    assert Checkpoints(tmp_path).latest() is None


def test_trainables_of_half_precision_are_refused(data):
    run = Run(data)
    run.model.to(torch.bfloat16)
    with pytest.raises(TrainingError, match="bfloat16, in which small steps round to nothing"):
        run.losses()


def test_a_detached_adapter_is_not_trained(data):
    run = Run(data)
    run.adapter.detach()
    with pytest.raises(AdapterError, match="detached"):
        run.losses()


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"batch_size": 0}, {"accumulate": 0}, {"val_every": 0}, {"lr": -1.0}, {"lr": math.nan},
        {"lr": math.inf}, {"head_lr": -1.0}, {"clip": 0.0}, {"warmup": 1.5}, {"label_smoothing": 1.0}, {"mixup": -0.1},
        {"seed": -1}, {"optimizer": "adam"}, {"precision": "fp16"}, {"augment": "lite"},
    ],
)  # fmt: skip
def test_impossible_training_values_are_refused_by_name(wrong):
    with pytest.raises(TrainingError, match=next(iter(wrong))):
        Training(**wrong)


@pytest.mark.parametrize(("every", "validated"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (9, [4])])
def test_val_is_read_every_so_many_epochs_and_after_the_last_and_changes_no_loss(data, every, validated):
    run = Run(data, Training(epochs=5, batch_size=4, val_every=every))
    val = Images(data.val, run.adapter.vit.preprocessing)
    steps = list(fit(run.model, run.adapter, run.train, val, run.training))
    assert [step.epoch for step in steps if step.accuracy is not None] == validated
    assert [step.loss for step in steps] == Run(data, Training(epochs=5, batch_size=4)).losses()


# --- the optimizer ---------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine(data):
    training = dataclasses.replace(PLAIN, epochs=4, warmup=0.25, lr=0.02, head_lr=0.08)
    found = [step.lr for step in Run(data, training).steps()]
    rise, steps = 3, 12
    line = [0.02 * (k + 1) / rise for k in range(rise)]
    cosine = [0.02 * (1 + math.cos(math.pi * k / (steps - rise))) / 2 for k in range(steps - rise)]
    assert found == pytest.approx(line + cosine)
    assert found[-1] < 0.001


def test_the_head_has_its_own_learning_rate(data):
    still = Run(data, dataclasses.replace(PLAIN, lr=0.0, head_lr=1e-2))
    before = still.bits()
    still.losses()
    moved = {name for name, bits in still.bits().items() if bits != before[name]}
    assert moved == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", ["full", "bitfit", "lora"])
def test_weight_decay_is_of_matrices_alone(data, name):
    training = dataclasses.replace(PLAIN, epochs=1, batch_size=22, lr=0.1, warmup=0.0, weight_decay=0.5)
    decayed, free = Run(data, training, name), Run(data, dataclasses.replace(training, weight_decay=0.0), name)
    born = {n: t.detach().clone() for n, t in free.adapter.tensors().items()}
    assert decayed.losses() == free.losses()
    for n, t in decayed.adapter.tensors().items():
        shrunk = free.adapter.tensors()[n] - (0.1 * 0.5 * born[n] if t.ndim > 1 else 0)
        torch.testing.assert_close(t, shrunk, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_step_of_plain_sgd_is_the_clipped_gradient(data, clip):
    training = dataclasses.replace(
        PLAIN, epochs=1, batch_size=22, optimizer="sgd", momentum=0.0, lr=0.1, warmup=0.0, weight_decay=0.0, clip=clip
    )
    run, plain = Run(data, training, dropout=0.0), Run(data, training, dropout=0.0)
    run.losses()
    x, y, _ = plain.train.batch(order(0, 0, 22))
    F.cross_entropy(plain.model(normalise(x, plain.train.preprocessing)), y).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in plain.adapter.parameters()))
    factor = 1.0 if clip is None else clip / (norm + 1e-6)
    assert factor < 1 or clip is None
    for name, p in plain.adapter.tensors().items():
        torch.testing.assert_close(run.adapter.tensors()[name], p - 0.1 * factor * p.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("mixup", [0.0, 0.7])
def test_the_loss_is_the_plain_formula_of_mixup_and_label_smoothing(data, mixup, smoothing):
    training = dataclasses.replace(PLAIN, mixup=mixup, label_smoothing=smoothing)
    run, plain = Run(data, training, dropout=0.0), Run(data, training, dropout=0.0)
    chosen = order(0, 0, 22)[:8]
    partner, share = _mixup(training, 0, 8)
    x, y, _ = plain.train.batch(chosen)
    x = normalise(x, plain.train.preprocessing)
    total = 0.0
    for i in range(8):
        j = int(partner[i])
        log = plain.model((share * x[i] + (1 - share) * x[j])[None]).log_softmax(1)[0]
        target = torch.full((3,), smoothing / 3)
        target[y[i]] += share * (1 - smoothing)
        target[y[j]] += (1 - share) * (1 - smoothing)
        total -= (target * log).sum().item()
    assert run.losses(1) == [pytest.approx(total / 8, abs=1e-5)]
    assert 0.5 <= share < 1 if mixup else share == 1


def test_mixups_shares_are_beta_distributed():
    training = Training(mixup=0.4)
    shares = torch.tensor([_mixup(training, step, 1)[1] for step in range(4000)], dtype=torch.float64)
    beta = torch.distributions.Beta(0.4, 0.4).sample((100_000,)).double()
    expected = torch.maximum(beta, 1 - beta)
    for q in (0.1, 0.5, 0.9):
        assert shares.quantile(q).item() == pytest.approx(expected.quantile(q).item(), abs=0.02)


# --- precision -------------------------------------------------------------------------------------------------------


def test_auto_computes_in_bf16_where_the_device_does_so_natively(data):
    def losses(precision):
        return Run(data, dataclasses.replace(PLAIN, precision=precision)).losses(3)

    assert losses("auto") == losses("bf16" if native_bf16(CPU) else "fp32")
    assert losses("bf16") != losses("fp32")
    assert losses("bf16") == pytest.approx(losses("fp32"), abs=0.05)


def test_auto_does_not_emulate_bf16(data, monkeypatch):
    expected = Run(data, dataclasses.replace(PLAIN, precision="fp32")).losses(3)
    monkeypatch.setattr(sys.modules["deltavit.train.evaluate"], "native_bf16", lambda device: False)
    assert Run(data, dataclasses.replace(PLAIN, precision="auto")).losses(3) == expected


@pytest.mark.parametrize("name", methods())
def test_what_trains_stays_in_fp32_whatever_computes(data, name):
    run = Run(data, dataclasses.replace(PLAIN, precision="bf16"), name)
    run.losses(2)
    assert {p.dtype for p in run.adapter.parameters()} == {torch.float32}


# --- evaluate and predict --------------------------------------------------------------------------------------------


@pytest.fixture
def trained(data):
    run = Run(data, dataclasses.replace(PLAIN, epochs=3))
    run.losses()
    return run


@pytest.fixture
def partly_broken(data, tmp_path):
    """The test split with one picture of the second class torn."""
    torn = tmp_path / "torn.png"
    torn.write_bytes(data.test.paths[3].read_bytes()[:60])
    paths = list(data.test.paths)
    paths[3] = torn
    return dataclasses.replace(data.test, paths=tuple(paths))


@torch.no_grad()
def by_hand(run, split):
    """Per picture: its label, and the logits or None where it is broken."""
    rows = []
    for path, label in zip(split.paths, split.labels, strict=True):
        try:
            x = to_tensor(decode(Path(path)), run.adapter.preprocessing)
            rows.append((label, run.model(normalise(x[None], run.adapter.preprocessing))[0]))
        except DataError:
            rows.append((label, None))
    return rows


@pytest.mark.parametrize("batch_size", [1, 3, 128])
def test_evaluate_is_a_plain_loop_and_a_broken_picture_counts_as_wrong(trained, partly_broken, batch_size):
    rows = by_hand(trained, partly_broken)
    right = [logits is not None and int(logits.argmax()) == label for label, logits in rows]
    a_class = [[r for r, (label, _) in zip(right, rows, strict=True) if label == c] for c in range(3)]
    losses = [F.cross_entropy(z[None], torch.tensor([y])).item() for y, z in rows if z is not None]
    images = Images(partly_broken, trained.adapter.preprocessing, broken="miss")
    scores = evaluate(trained.model, images, batch_size=batch_size, precision="fp32")
    assert scores.accuracy == pytest.approx(sum(right) / 7)
    assert scores.class_accuracy == pytest.approx(sum(sum(r) / len(r) for r in a_class) / 3)
    assert scores.loss == pytest.approx(sum(losses) / 6, abs=1e-5)
    assert (scores.pictures, scores.missed) == (7, 1)
    assert not right[3]


@pytest.mark.parametrize("mode", [True, False])
def test_evaluate_leaves_the_mode_as_it_was_and_has_no_dropout(trained, data, mode):
    images = Images(data.test, trained.adapter.preprocessing)
    expected = evaluate(trained.model.eval(), images)
    assert evaluate(trained.model.train(mode), images) == expected
    assert trained.model.training is mode


def test_evaluate_maps_the_labels_of_a_data_set_to_those_of_the_head(trained, data):
    images = Images(data.test, trained.adapter.preprocessing)
    turned = dataclasses.replace(data.test, labels=tuple((y + 1) % 3 for y in data.test.labels))
    mapped = evaluate(trained.model, Images(turned, trained.adapter.preprocessing), labels=[2, 0, 1])
    assert mapped == evaluate(trained.model, images)


def test_evaluate_refuses_no_picture_and_a_class_beyond_the_head(trained, data):
    with pytest.raises(DataError, match="no pictures"):
        evaluate(trained.model, Images(subset(data, 0), trained.adapter.preprocessing))
    beyond = dataclasses.replace(data.test, labels=(0, 1, 2, 3, 0, 0, 0))
    with pytest.raises(DataError, match="class number 3"):
        evaluate(trained.model, Images(beyond, trained.adapter.preprocessing))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_predictions_are_evaluates_decisions_and_a_broken_picture_has_its_reason(trained, partly_broken, batch_size):
    pre = trained.adapter.preprocessing
    names = trained.adapter.classes
    guesses = list(
        predict(trained.model, partly_broken.paths, names, pre, top=9, batch_size=batch_size, precision="fp32")
    )
    assert [g.path for g in guesses] == list(partly_broken.paths)
    for guess, (_, logits) in zip(guesses, by_hand(trained, partly_broken), strict=True):
        if logits is None:
            assert guess.classes == []
            assert "torn.png" in guess.error
            continue
        assert guess.error is None
        assert guess.classes[0][0] == names[int(logits.argmax())]
        plain = dict(zip(names, logits.softmax(0).tolist(), strict=True))
        assert dict(guess.classes) == pytest.approx(plain, abs=1e-5)
    right = [
        bool(g.classes) and g.classes[0][0] == names[y] for g, y in zip(guesses, partly_broken.labels, strict=True)
    ]
    images = Images(partly_broken, pre, broken="miss")
    assert evaluate(trained.model, images, precision="fp32").accuracy == pytest.approx(sum(right) / 7)


def test_broken_pictures_in_training_weigh_nothing(data, tmp_path):
    paths = list(data.train.paths)
    paths[5] = tmp_path / "torn.png"
    paths[5].write_bytes(b"no picture")
    split = dataclasses.replace(data.train, paths=tuple(paths))
    training = dataclasses.replace(PLAIN, epochs=1, batch_size=22, mixup=0.5, label_smoothing=0.1)
    run = Run(data, training, split=split)
    run.train = Images(split, run.adapter.preprocessing, broken="skip", ceiling=1)
    assert all(map(math.isfinite, run.losses()))
    assert "torn.png" in run.train.broken[0]
