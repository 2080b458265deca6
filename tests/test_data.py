"""Layouts, splits, transforms, the order of the pictures, and reading them in batches."""

import csv
import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deltavit.core.errors import DataError
from deltavit.core.site import Preprocessing
from deltavit.data import Images, Split, augment, batches, decode, normalise, open_data, open_images, order, to_tensor
from deltavit.data import splits as splits_module
from deltavit.data.splits import cut

SHARED = Path(__file__).parents[2] / "shared" / "data"
SMALL = Preprocessing(size=8)
GOLDEN_ORDER = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]  # a change here changes every recorded run


def picture(path, number, size=(10, 12)):
    """A small picture that only this number has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def classes(root, counts, start=0):
    """`root/NAME/i.png` for each name and count, no two pictures equal."""
    for name, count in counts.items():
        for i in range(count):
            start += 1
            picture(root / name / f"{i}.png", start)
    return root


def refused(path, match, **options):
    with pytest.raises(DataError, match=match) as caught:
        open_data(path, **options)
    assert "\n" not in str(caught.value)


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# layouts


def test_given_splits_are_kept_and_classes_are_sorted_as_strings(tmp_path):
    for i, split in enumerate(("train", "validation", "test")):
        classes(tmp_path / split, {"10": 3 - i, "2": 3 - i, "a": 3 - i}, start=100 * i)
    data = open_data(tmp_path)
    assert data.classes == ("10", "2", "a")
    assert data.kind == "folders"
    assert (len(data.train), len(data.val), len(data.test)) == (9, 6, 3)
    assert data.train.labels == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert data.val.names[0] == "validation/10/0.png"
    assert data.notes == []


def test_a_missing_val_is_cut_from_train_and_a_missing_test_is_none(tmp_path):
    data = open_data(classes(tmp_path / "train", {"a": 10, "b": 20}).parent, val=0.2)
    assert Counter(data.train.labels) == {0: 8, 1: 16}
    assert Counter(data.val.labels) == {0: 2, 1: 4}
    assert data.test is None
    assert not set(data.train.paths) & set(data.val.paths)


def test_one_folder_of_classes_is_cut_in_three_by_the_seed(tmp_path):
    classes(tmp_path, {"a": 20, "b": 30})
    first, again, other = open_data(tmp_path), open_data(tmp_path), open_data(tmp_path, seed=1)
    assert (len(first.train), len(first.val), len(first.test)) == (40, 5, 5)
    assert sorted(first.train.paths + first.val.paths + first.test.paths) == sorted(tmp_path.rglob("*.png"))
    assert first == again
    assert first.val.paths != other.val.paths
    assert open_data(tmp_path, test=0).test is None


def test_pictures_are_found_in_folders_below_a_class_and_the_rest_is_counted(tmp_path):
    classes(tmp_path, {"a": 5, "b": 5})
    picture(tmp_path / "a" / "deeper" / "x.PNG", 99)
    picture(tmp_path / "a" / ".thumbs" / "x.png", 98)
    picture(tmp_path / "loose.png", 97)
    written(tmp_path / "a" / "notes.txt", "")
    written(tmp_path / "b" / ".DS_Store", "")
    (tmp_path / ".git").mkdir()
    os.mkfifo(tmp_path / "b" / "pipe.png")
    data = open_data(tmp_path)
    assert len(data.train) + len(data.val) + len(data.test) == 11
    assert data.notes == [
        "skipped 3 hidden",
        "skipped 1 not a regular file",
        "skipped 1 outside any class folder",
        "skipped 1 without a picture suffix",
    ]


def lists(root, train="0 1 0 1", val="0 1", test="1 0"):
    """The VTAB-1k layout, one picture a label."""
    number = 0
    both = []
    for name, labels in (("train800", train), ("val200", val), ("test", test)):
        rows = []
        for label in labels.split():
            number += 1
            picture(root / "images" / name / f"{number}.png", number)
            rows.append(f"images/{name}/{number}.png {label}")
        both += rows if name != "test" else []
        written(root / f"{name}.txt", "\n".join(rows) + "\n")
    written(root / "train800val200.txt", "\n".join(both))
    return root


def test_vtab_lists_are_read_in_their_order(tmp_path):
    data = open_data(lists(tmp_path))
    assert data.kind == "lists"
    assert data.classes == ("0", "1")
    assert (data.train.labels, data.val.labels, data.test.labels) == ((0, 1, 0, 1), (0, 1), (1, 0))
    assert data.train.names[0] == "images/train800/1.png"


def test_twelve_integer_classes_stay_in_numeric_order(tmp_path):
    data = open_data(lists(tmp_path, train=" ".join(map(str, range(12)))))
    assert data.classes == tuple(map(str, range(12)))
    assert data.train.labels == tuple(range(12))


def test_training_on_train800val200_keeps_val_and_says_so(tmp_path):
    data = open_data(lists(tmp_path), train_list="train800val200.txt")
    assert (len(data.train), len(data.val), len(data.test)) == (6, 2, 2)
    assert data.notes == ["overlap: 2 of 2 pictures of val are byte for byte in train"]


def test_classes_txt_names_the_integers(tmp_path):
    written(lists(tmp_path) / "classes.txt", "zebra\nant\n")
    data = open_data(tmp_path)
    assert data.classes == ("zebra", "ant")
    assert data.train.labels == (0, 1, 0, 1)


def table(root, rows, header=("path", "label")):
    with (root / "data.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([header, *rows])
    return root / "data.csv"


def test_a_csv_without_splits_is_cut_and_one_with_splits_is_kept(tmp_path):
    classes(tmp_path / "p", {"a": 10, "b, c": 10})
    rows = [(path.relative_to(tmp_path).as_posix(), path.parent.name) for path in sorted(tmp_path.rglob("*.png"))]
    data = open_data(table(tmp_path, rows))
    assert (data.kind, data.classes) == ("csv", ("a", "b, c"))
    assert (len(data.train), len(data.val), len(data.test)) == (16, 2, 2)

    rows = [(*row, "test" if i % 10 == 0 else "valid" if i % 10 == 1 else "train") for i, row in enumerate(rows)]
    data = open_data(table(tmp_path, rows, ("path", "label", "split")))
    assert (len(data.train), len(data.val), len(data.test)) == (16, 2, 2)
    assert data.test.names == ("p/a/0.png", "p/b, c/0.png")


@pytest.mark.parametrize(("name", "counts"), [("cifar100", (800, 200, 1000)), ("omniglot8", (800, 200, 496))])
def test_the_shared_sets_open_whole(name, counts):
    if not (SHARED / name).is_dir():
        pytest.skip(f"../shared/data/{name} is not beside this checkout")
    data = open_data(SHARED / name)
    assert (len(data.train), len(data.val), len(data.test)) == counts
    assert len(data.classes) == {"cifar100": 100, "omniglot8": 8}[name]
    assert min(Counter(data.train.labels).values()) == 800 // len(data.classes)
    assert data.notes == []


# what is refused


def test_nothing_one_class_and_an_empty_class_are_refused(tmp_path):
    refused(tmp_path / "none", "is neither a folder nor a CSV file")
    refused(tmp_path, "no class folders with pictures in")
    classes(tmp_path, {"a": 5})
    refused(tmp_path, "has one class only, 'a'")
    (tmp_path / "b").mkdir()
    refused(tmp_path, "class 'b' has no picture")


def test_one_picture_a_class_is_too_few_to_cut(tmp_path):
    refused(classes(tmp_path, {"a": 1, "b": 1}), "2 pictures in 2 classes are too few to cut 0.1 and 0.1")


@pytest.mark.parametrize("options", [{"val": 0}, {"val": 1.0}, {"val": 0.5, "test": 0.5}, {"test": -0.1}])
def test_shares_that_leave_nothing_are_refused(tmp_path, options):
    refused(tmp_path, "leave nothing to train on", **options)


def test_a_class_that_train_does_not_have_is_refused(tmp_path):
    classes(tmp_path / "train", {"a": 2, "b": 2})
    classes(tmp_path / "val", {"a": 1, "c": 1}, start=50)
    refused(tmp_path, "class 'c' is in val .* but not in train")


def test_two_folders_for_val_are_refused(tmp_path):
    for name in ("train", "val", "valid"):
        classes(tmp_path / name, {"a": 2, "b": 2})
    refused(tmp_path, "second folder for val")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("../secret.png 0", "leaves .* paths must be relative"),
        ("/etc/passwd 0", "leaves"),
        ("C:\\x.png 0", "leaves"),
        ("images\\..\\..\\x.png 0", "leaves"),
        ("images/none.png 0", "line 5: there is no file"),
        ("x" * 5000 + " 0", "there is no file"),
        ("images/train800/1.png", "is not a relative path, a space and a label"),
        ("images/train800/1.png -1", "label from 0 up"),
        ("images/train800/1.png 1e3", "label from 0 up"),
        ("images/train800/1.png 1", "is in train and again in train"),
        ("images/val200/5.png 1", "is in train and again in val"),
        ("images/extra.png 3", "labels go up to 3, but class 2 has no picture"),
        ("images/extra.png 999999999", "labels go up to 999999999, but class 2 has no picture"),
    ],
)
def test_a_bad_line_in_a_list_is_refused(tmp_path, line, reason):
    picture(lists(tmp_path) / "images" / "extra.png", 77)
    with (tmp_path / "train800.txt").open("a") as file:
        file.write(line)
    refused(tmp_path, reason)


def test_class_files_that_do_not_fit_are_refused(tmp_path):
    lists(tmp_path)
    for text, reason in [
        ("a\n", "label 1 is out of range: .* names 1 classes"),
        ("a\nb\nc\n", "class 'c' has no picture in train"),
        ("a\na\n", "has 'a' twice"),
    ]:
        written(tmp_path / "classes.txt", text)
        refused(tmp_path, reason)


def test_bad_tables_are_refused(tmp_path):
    classes(tmp_path, {"a": 4, "b": 4})
    rows = [("a/0.png", "a"), ("b/0.png", "b")]
    refused(table(tmp_path, rows, ("file", "label")), "no column 'path'")
    refused(table(tmp_path, [*rows, ("../a.png", "a")]), "line 4: '../a.png' leaves")
    refused(table(tmp_path, [*rows, ("a/1.png", "")]), "line 4: path 'a/1.png' and label ''")
    refused(table(tmp_path, [*rows, ("a/0.png", "b")]), "is in all and again in all")
    refused(table(tmp_path, []), "no pictures to train on")
    refused(table(tmp_path, [(*row, "tran") for row in rows], ("path", "label", "split")), "did you mean 'train'")
    (tmp_path / "data.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    refused(tmp_path / "data.csv", "is not UTF-8 text")


def test_one_file_in_two_folders_is_refused_and_its_copy_is_noted(tmp_path):
    classes(tmp_path / "train", {"a": 2, "b": 2})
    classes(tmp_path / "val", {"a": 1, "b": 1}, start=50)
    copy = tmp_path / "val" / "a" / "copy.png"
    copy.write_bytes((tmp_path / "train" / "b" / "0.png").read_bytes())
    assert open_data(tmp_path).notes == ["overlap: 1 of 3 pictures of val are byte for byte in train"]
    copy.unlink()
    copy.symlink_to(tmp_path / "train" / "b" / "0.png")
    refused(tmp_path, "is in train and again in val")


# digests


def test_the_digest_is_of_names_labels_and_contents_and_not_of_the_place(tmp_path):
    here, there = (open_data(classes(tmp_path / name, {"a": 10, "b": 10})) for name in ("here", "there"))
    assert here.train.digest == there.train.digest
    plain = hashlib.sha256()
    for path, label in zip(here.train.paths, here.train.labels, strict=True):
        name = path.relative_to(tmp_path / "here").as_posix()
        plain.update(f"{name}\0{label}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    assert here.train.digest == plain.hexdigest()

    changed = [
        Split("train", here.train.paths[::-1], here.train.labels, here.train.root),
        Split("train", here.train.paths, here.train.labels[::-1], here.train.root),
    ]
    picture(there.train.paths[0], 1234)
    changed.append(Split("train", there.train.paths, there.train.labels, there.train.root))
    assert len({here.train.digest, *(split.digest for split in changed)}) == 4


def test_a_large_set_is_digested_by_names_and_sizes_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(splits_module, "HASHED_FILES", 5)
    monkeypatch.setattr("deltavit.data.layouts.HASHED_FILES", 5)
    data = open_data(classes(tmp_path, {"a": 10, "b": 10}))
    assert "exact duplicates were not looked for" in data.notes[0]
    before = data.train.digest
    data.train.paths[0].write_bytes(b"x")
    assert Split("train", data.train.paths, data.train.labels, data.train.root).digest != before


def test_the_manifest_is_json_and_equal_for_equal_data(tmp_path):
    classes(tmp_path, {"a": 10, "b": 10})
    manifest = open_data(tmp_path, seed=3).manifest()
    assert json.loads(json.dumps(manifest)) == manifest == open_data(tmp_path, seed=3).manifest()
    assert (manifest["kind"], manifest["classes"], manifest["seed"]) == ("classes", 2, 3)
    assert manifest["train"]["size"] == 16
    assert "EXIF" in manifest["decode"]


def test_a_folder_to_predict_is_searched_in_order(tmp_path):
    wanted = [picture(tmp_path / name, i) for i, name in enumerate(("a/1.png", "a/2.JPG", "b.webp"))]
    written(tmp_path / "c.txt", "")
    picture(tmp_path / ".hidden" / "x.png", 5)
    assert open_images(tmp_path) == wanted
    assert open_images([wanted[2], tmp_path / "a"]) == [wanted[2], *wanted[:2]]
    (tmp_path / "empty").mkdir()
    for path, reason in (("empty", "no pictures in"), ("none", "does not exist")):
        with pytest.raises(DataError, match=reason):
            open_images(tmp_path / path)
    with pytest.raises(DataError, match="an empty list"):
        open_images([])


# the cut


@st.composite
def labelled(draw):
    counts = draw(st.lists(st.integers(5, 30), min_size=2, max_size=6))
    return [label for label, count in enumerate(counts) for _ in range(count)]


@settings(max_examples=60, deadline=None)
@given(labelled(), st.integers(0, 2**40), st.sampled_from([(0.1,), (0.1, 0.1), (0.25, 0.15), (0.2, 0.4)]))
def test_a_cut_is_complete_disjoint_stratified_and_repeatable(labels, seed, shares):
    contents = [f"{i:04}" for i in range(len(labels))]
    parts = cut(labels, contents, shares, seed)
    assert sorted(i for part in parts for i in part) == list(range(len(labels)))
    assert [len(part) for part in parts[1:]] == [round(share * len(labels)) for share in shares]
    assert parts == cut(labels, contents, shares, seed)
    for share, part in zip((1 - sum(shares), *shares), parts, strict=True):
        for label, count in Counter(labels).items():
            assert abs(sum(labels[i] == label for i in part) - share * count) < 2


@settings(max_examples=60, deadline=None)
@given(labelled(), st.integers(0, 99), st.data())
def test_equal_pictures_never_straddle_a_cut(labels, seed, data):
    contents = data.draw(st.lists(st.integers(0, len(labels)).map(str), min_size=len(labels), max_size=len(labels)))
    try:
        parts = cut(labels, contents, (0.2, 0.2), seed)
    except DataError:
        return  # so many duplicates that a class would be missing
    homes = Counter(content for part in parts for content in {contents[i] for i in part})
    assert set(homes.values()) == {1}


@pytest.mark.parametrize("seed", range(10))
def test_a_class_of_one_picture_stays_in_train(seed):
    labels = [0] * 40 + list(range(1, 11))
    train, _, _ = cut(labels, [str(i) for i in range(50)], (0.2, 0.2), seed)
    assert {labels[i] for i in train} == set(range(11))


def test_duplicates_on_disk_stay_together(tmp_path):
    classes(tmp_path, {"a": 12, "b": 12})
    for i in range(12):
        (tmp_path / "b" / f"copy{i}.png").write_bytes((tmp_path / "b" / f"{i}.png").read_bytes())
    for seed in range(3):
        data = open_data(tmp_path, seed=seed, val=0.2, test=0.2)
        assert data.notes == []
        assert len(data.train) + len(data.val) + len(data.test) == 36


def test_ten_thousand_classes_are_cut(tmp_path):
    labels = [i % 10_000 for i in range(20_000)]
    train, val, test = cut(labels, [str(i) for i in range(20_000)], (0.1, 0.1), 0)
    assert (len(train), len(val), len(test)) == (16_000, 2000, 2000)
    assert len({labels[i] for i in train}) == 10_000


# the order


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 9), st.integers(-5, 2**63), st.integers(0, 1000))
def test_shards_join_to_the_global_batch_and_every_index_comes_once(n, size, world, seed, epoch):
    ranks = [list(batches(seed, epoch, n, size, rank=rank, world=world)) for rank in range(world)]
    whole = list(batches(seed, epoch, n, size))
    for (step, _, every), *shards in zip(whole, *ranks, strict=True):
        assert {shard[0] for shard in shards} == {step}
        np.testing.assert_array_equal(np.concatenate([mine for _, mine, _ in shards]), every)
        lengths = [len(mine) for _, mine, _ in shards]
        assert max(lengths) - min(lengths) <= 1
    assert sorted(i for _, mine, _ in whole for i in mine) == list(range(n))
    assert all(len(every) == size for _, _, every in whole[:-1])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 70), st.booleans())
def test_a_resume_from_any_batch_gives_the_same_tail(n, size, start, drop_last):
    whole = list(batches(7, 3, n, size, drop_last=drop_last))
    tail = list(batches(7, 3, n, size, start=start, drop_last=drop_last))
    assert [(step, every.tolist()) for step, _, every in tail] == [
        (step, every.tolist()) for step, _, every in whole[start:]
    ]
    assert all(len(every) == size for _, _, every in whole) or not drop_last


def test_the_order_differs_by_seed_and_epoch_and_never_changes():
    assert order(0, 0, 10).tolist() == GOLDEN_ORDER
    assert len({tuple(order(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}) == 16


def test_the_order_is_uniform():
    first = Counter(int(order(seed, 0, 4)[0]) for seed in range(2000))
    assert all(abs(first[i] - 500) < 100 for i in range(4))


def test_more_ranks_than_pictures_leave_some_empty():
    lengths = [len(mine) for rank in range(5) for _, mine, _ in batches(0, 0, 2, 8, rank=rank, world=5)]
    assert lengths == [1, 1, 0, 0, 0]


def test_a_last_batch_of_one_is_kept_unless_dropped():
    assert [len(every) for _, _, every in batches(0, 0, 9, 4)] == [4, 4, 1]
    assert [len(every) for _, _, every in batches(0, 0, 9, 4, drop_last=True)] == [4, 4]


@pytest.mark.parametrize("options", [{"rank": 2, "world": 2}, {"rank": -1}, {"start": -1}])
def test_an_impossible_rank_or_start_is_refused(options):
    with pytest.raises(ValueError, match="no batch of 4"):
        next(batches(0, 0, 8, 4, **options))


# transforms


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (8, 8), (3, 100)])
def test_squash_resizes_both_sides(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    plain = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    tensor = to_tensor(image, SMALL)
    assert (tensor.dtype, tensor.shape, tensor.is_contiguous()) == (torch.uint8, (3, 8, 8), True)
    np.testing.assert_array_equal(tensor.permute(1, 2, 0), plain)


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (32, 32)])
def test_crop_is_resizing_the_short_side_and_cutting_the_centre(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    pre = Preprocessing(size=12, resize="crop", crop=0.75, interpolation="bilinear")  # short side to 16
    width, height = size[0] // 2, size[1] // 2
    left, top = (width - 12) // 2, (height - 12) // 2
    small = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 12, top + 12))
    np.testing.assert_array_equal(to_tensor(image, pre).permute(1, 2, 0), np.asarray(small))


def test_a_very_long_picture_is_cropped_without_growing():
    assert to_tensor(Image.new("RGB", (60_000, 1)), Preprocessing(size=224, resize="crop")).shape == (3, 224, 224)


def test_preprocessing_that_does_not_exist_is_refused():
    image = Image.new("RGB", (8, 8))
    with pytest.raises(DataError, match="did you mean 'bicubic'"):
        to_tensor(image, Preprocessing(interpolation="bicubik"))
    with pytest.raises(DataError, match="no way to resize named 'pad'"):
        to_tensor(image, Preprocessing(resize="pad"))


def test_normalise_is_value_over_255_minus_mean_over_std():
    pre = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    batch = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    plain = [(batch[:, c].double() / 255 - pre.mean[c]) / pre.std[c] for c in range(3)]
    out = normalise(batch, pre)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.stack(plain, 1).float())


def test_none_changes_nothing_and_flip_mirrors_half():
    batch = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8)
    key = {"seed": 0, "epoch": 0, "indices": range(200)}
    assert torch.equal(augment(batch, **key), batch)
    flipped = augment(batch, "flip", **key)
    same = (flipped == batch).flatten(1).all(1)
    mirrored = (flipped == batch.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 70 < same.sum() < 130


def test_light_is_a_crop_of_the_reflected_picture():
    batch = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8)
    out = augment(batch, "light", seed=0, epoch=0, indices=range(30))
    padded = torch.nn.functional.pad(batch.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    met = set()
    for picture, result in zip(padded, out, strict=True):
        crops = {(y, x, f): picture[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5) for f in (0, 1)}
        fits = [key for key, crop in crops.items() if torch.equal(crop.flip(-1) if key[2] else crop, result)]
        assert len(fits) == 1
        met.add(fits[0])
    assert len(met) > 15


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_augmentation_depends_on_the_index_and_not_on_the_batch(indices, size):
    pictures = torch.arange(12 * 3 * 8 * 8).view(12, 3, 8, 8).to(torch.uint8)
    whole = augment(pictures, "light", seed=1, epoch=2, indices=range(12))
    chosen = indices[:size]
    assert torch.equal(augment(pictures[chosen], "light", seed=1, epoch=2, indices=chosen), whole[chosen])


def test_augmentation_differs_by_epoch_and_refuses_unknown_names():
    batch = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    first, second = (augment(batch, "light", seed=0, epoch=epoch, indices=range(20)) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert augment(batch[:0], "light", seed=0, epoch=0, indices=[]).shape == (0, 3, 16, 16)
    with pytest.raises(DataError, match="did you mean 'light'"):
        augment(batch, "lite", seed=0, epoch=0, indices=range(20))


# reading batches


@pytest.fixture
def split(tmp_path):
    paths = tuple(picture(tmp_path / f"{i}.png", i) for i in range(6))
    return Split("train", paths, (0, 1, 2, 0, 1, 2), tmp_path)


@pytest.mark.parametrize("cache_bytes", [None, 0])
@pytest.mark.parametrize("workers", [0, 2])
def test_train_evaluation_and_prediction_give_the_same_tensor_bit_for_bit(split, cache_bytes, workers):
    images = Images(split, SMALL, cache_bytes=cache_bytes, workers=workers)
    predicted = torch.stack([to_tensor(decode(path), SMALL) for path in split.paths])
    for indices in ([4, 1, 4], range(6), [0]):  # again and again: first decoded, then from the cache
        pictures, labels, ok = images.batch(indices)
        assert torch.equal(pictures, predicted[list(indices)])
        assert labels.tolist() == [split.labels[i] for i in indices]
        assert ok.all()
    trained = augment(pictures, "none", seed=0, epoch=0, indices=[0])
    assert torch.equal(normalise(trained, SMALL), normalise(predicted[:1], SMALL))


def test_an_empty_batch_is_empty(split):
    pictures, labels, ok = Images(split, SMALL).batch([])
    assert (pictures.shape, labels.dtype, len(ok)) == ((0, 3, 8, 8), torch.int64, 0)


def test_a_split_that_fits_is_decoded_once(split, monkeypatch):
    calls = Counter()

    def counted(path):
        calls[path] += 1
        return decode(path)

    monkeypatch.setattr("deltavit.data.images.decode", counted)
    for cache_bytes, times in ((6 * 3 * 64, 1), (6 * 3 * 64 - 1, 2)):
        calls.clear()
        images = Images(split, SMALL, cache_bytes=cache_bytes)
        for _ in range(2):
            images.batch(range(6))
        assert set(calls.values()) == {times}


def test_a_changed_batch_does_not_change_the_cache(split):
    images = Images(split, SMALL)
    first = images.batch([0])[0]
    kept = first.clone()
    first.zero_()
    assert torch.equal(images.batch([0])[0], kept)


def test_a_broken_picture_is_an_error_by_default(split):
    split.paths[3].write_bytes(b"")
    images = Images(split, SMALL)
    assert images.batch([0, 1])[2].all()
    with pytest.raises(DataError, match=r"3.png is empty"):
        images.batch([2, 3])


@pytest.mark.parametrize(("policy", "ceiling"), [("skip", 1), ("miss", 0)])
@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_a_broken_picture_is_never_replaced(split, policy, ceiling, cache_bytes):
    split.paths[3].write_bytes(b"")
    images = Images(split, SMALL, broken=policy, ceiling=ceiling, cache_bytes=cache_bytes)
    for _ in range(2):
        pictures, labels, ok = images.batch([2, 3, 4])
        assert ok.tolist() == [True, False, True]
        assert labels.tolist() == [2, 0, 1]
        assert not pictures[1].any()
    assert len(images.broken) == 1
    assert "3.png is empty" in images.broken[0]


def test_more_broken_pictures_than_the_ceiling_are_an_error_that_names_them(split):
    for i in (0, 1):
        split.paths[i].write_bytes(b"")
    with pytest.raises(DataError, match=r"2 broken pictures in train, 1 allowed: .*0.png is empty.*1.png is empty"):
        Images(split, SMALL, broken="skip", ceiling=1).batch(range(6))
    with pytest.raises(DataError, match="1 broken pictures in train, 0 allowed"):
        Images(split, SMALL, broken="skip").batch(range(6))


def test_a_class_with_nothing_but_broken_pictures_is_an_error(split):
    for i in (0, 3):
        split.paths[i].write_bytes(b"")
    with pytest.raises(DataError, match="every picture of class number 0 in train is broken"):
        Images(split, SMALL, broken="skip", ceiling=5).batch(range(6))
    assert Images(split, SMALL, broken="miss").batch(range(6))[2].sum() == 4


def test_an_unknown_policy_is_refused(split):
    with pytest.raises(DataError, match="did you mean 'skip'"):
        Images(split, SMALL, broken="skipp")


def test_pictures_asked_for_ahead_are_those_of_the_batch(tmp_path):
    split = Split("train", tuple(picture(tmp_path / f"{i}.png", i, (9, 7)) for i in range(6)), (0,) * 6)
    plain = Images(split, Preprocessing(size=8), cache_bytes=0, workers=0).batch(range(6))[0]
    images = Images(split, Preprocessing(size=8), cache_bytes=0)
    images.ahead([3, 4, 5])
    images.ahead([3])
    assert torch.equal(images.batch([4, 3, 0])[0], plain[[4, 3, 0]])
    assert torch.equal(images.batch([5, 5, 1])[0], plain[[5, 5, 1]])
    assert not images._coming


def test_lists_may_leave_a_class_to_test_alone_and_say_so(tmp_path):
    picture(lists(tmp_path) / "images" / "extra.png", 77)
    with (tmp_path / "test.txt").open("a") as file:
        file.write("images/extra.png 2\n")
    data = open_data(tmp_path)
    assert data.classes == ("0", "1", "2")
    assert 2 in data.test.labels
    assert "1 of 3 classes have no picture in train ('2'): they cannot be learned" in data.notes
