"""Protocols as data, and building their tasks from owners' files in their real formats, made small here."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import stat
import struct
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from deltavit.cli.data import data as commands
from deltavit.core.errors import DataError
from deltavit.data import open_data
from deltavit.data.build import READERS, build
from deltavit.data.decode import decode
from deltavit.data.formats import Tree, mat, norb, png
from deltavit.data.protocols import EMBEDDED, LISTS_ONLY, protocol, protocols

FULL = Path(__file__).parents[2] / "shared" / "data_full"
# VPT's appendix, in the order of methods.md section 1: classes, test
VTAB = [
    (100, 10_000), (102, 6_084), (47, 1_880), (102, 6_149), (37, 3_669), (10, 26_032), (397, 21_750),
    (2, 32_768), (10, 5_400), (45, 6_300), (5, 42_670),
    (8, 15_000), (6, 15_000), (6, 22_735), (4, 711), (16, 73_728), (16, 73_728), (18, 12_150), (9, 12_150),
]  # fmt: skip
NOAH = [
    "cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397", "patch_camelyon",
    "eurosat", "resisc45", "diabetic_retinopathy", "clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc",
    "dsprites_ori", "smallnorb_azi", "smallnorb_ele",
]  # fmt: skip


def jpeg(number, mode="JPEG"):
    """A small picture that only this number has."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, mode)
    return file.getvalue()


def put(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def small(name, task, *, classes, train, val, test, **changes):
    """The protocol with the sizes of this task small enough for a test."""
    told = protocol(name)
    less = dataclasses.replace(told.task(task), classes=classes, train=train, val=val, test=test, golden={}, **changes)
    return dataclasses.replace(told, tasks=(less,))


def contents(split):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in split.paths]


# The data of the protocols


def test_vtab_has_the_19_tasks_of_the_paper_in_order():
    told = protocol("vtab-1k")
    assert [(task.classes, task.test) for task in told.tasks] == VTAB
    assert all((task.train, task.val) == (800, 200) for task in told.tasks)
    assert {group: len(names) for group, names in told.groups.items()} == {
        "natural": 7, "specialized": 4, "structured": 8,
    }  # fmt: skip
    assert told.train_on == "train+val"
    assert told.resize == "squash"
    assert len(told.normalisation) == 2


def test_mean_heads_are_those_of_published_parameter_counts():
    heads = {name: [769 * task.classes for task in protocol(name).tasks] for name in ("vtab-1k", "fgvc", "kronecker")}
    assert {name: sum(sizes) // len(sizes) for name, sizes in heads.items()} == {
        "vtab-1k": 38_045, "fgvc": 180_407, "kronecker": 129_961,
    }  # fmt: skip
    elevater = sum(task.classes for task in protocol("elevater-5-shot").tasks) + 20  # VOC 2007, left out
    assert 513 * elevater // 20 == 29_523


def test_official_training_sets_add_up():
    whole = {
        ("fgvc", "cub"): 11_788, ("fgvc", "nabirds"): 48_562, ("fgvc", "flowers102"): 8_189, ("fgvc", "dogs"): 20_580,
        ("fgvc", "cars"): 16_185, ("few-shot", "aircraft"): 10_000, ("few-shot", "food101"): 101_000,
        ("few-shot", "flowers102"): 8_189, ("few-shot", "pets"): 7_349, ("few-shot", "cars"): 16_185,
        ("kronecker", "cifar10"): 60_000, ("kronecker", "sun397"): 397 * 100, ("elevater-5-shot", "food101"): 101_000,
        ("elevater-5-shot", "camelyon"): 327_680, ("elevater-5-shot", "caltech101"): 9_144,
        ("elevater-5-shot", "resisc45"): 31_500, ("elevater-5-shot", "cars"): 16_185,
    }  # fmt: skip
    for (name, key), size in whole.items():
        task = protocol(name).task(key)
        assert task.train + task.val + task.test == size, (name, key)


def test_every_task_has_a_reader_or_says_why_not():
    for told in protocols().values():
        for task in told.tasks:
            why_not = task.builder == EMBEDDED or (task.builder == LISTS_ONLY and task.notes)
            assert task.builder in READERS or why_not, task.name
            assert task.source
            assert set(task.golden) <= {"train", "val", "test"}


def test_few_shot_protocols_say_shots_and_seeds():
    assert protocol("few-shot").shots == (1, 2, 4, 8, 16)
    assert protocol("few-shot").seeds == (0, 1, 2)
    assert protocol("elevater-5-shot").shots == (5,)


def test_unknown_names_give_the_nearest():
    with pytest.raises(DataError, match="did you mean 'vtab-1k'"):
        protocol("vtab1k")
    with pytest.raises(DataError, match=r"did you mean 'clevr_count'\?"):
        protocol("vtab-1k").task("clevr_coun")


# Finding and checking


def test_folders_of_the_lists_in_wide_use_are_found(tmp_path):
    for name in NOAH:
        (tmp_path / name).mkdir()
    assert [path.name for path in protocol("vtab-1k").find(tmp_path).values()] == NOAH


def test_one_line_names_all_that_is_missing(tmp_path):
    (tmp_path / "svhn").mkdir()
    with pytest.raises(DataError) as error:
        protocol("vtab-1k").find(tmp_path, ["svhn", "cifar100", "dtd"])
    line = str(error.value)
    assert "\n" not in line
    assert str(tmp_path) in line
    assert "cifar100 (nor cifar, " in line
    assert "dtd" in line
    assert "svhn" not in line
    with pytest.raises(DataError, match="is not a folder"):
        protocol("folder").data("x", tmp_path / "nowhere")


def test_the_data_section_of_a_recipe(tmp_path):
    (tmp_path / "food-101").mkdir()
    assert protocol("few-shot").data("food101", tmp_path, shots=4, seed=2) == {
        "path": str(tmp_path / "food-101"), "train_on": "train", "shots": 4, "shots_seed": 2,
    }  # fmt: skip
    with pytest.raises(DataError, match="has 1, 2, 4, 8, 16 shots, not 3"):
        protocol("few-shot").data("food101", tmp_path, shots=3)
    assert protocol("folder").data("food-101", tmp_path) == {"path": str(tmp_path / "food-101"), "train_on": "train"}


def test_class_folders_leave_val_to_be_cut_in_the_protocols_share(tmp_path):
    (tmp_path / "cifar10" / "train").mkdir(parents=True)
    assert protocol("kronecker").data("cifar10", tmp_path)["val"] == 0.2


def vtab_lists(root, train=8, val=2, test=6):
    lines = {"train": [], "val": [], "test": []}
    for i in range(train + val + test):
        split = "train" if i < train else "val" if i < train + val else "test"
        put(root, f"images/{split}/{i}.jpg", jpeg(i))
        lines[split].append(f"images/{split}/{i}.jpg {i % 2}\n")
    put(root, "train800.txt", "".join(lines["train"]))
    put(root, "val200.txt", "".join(lines["val"]))
    put(root, "train800val200.txt", "".join(lines["train"] + lines["val"]))
    put(root, "test.txt", "".join(lines["test"]))


def test_lists_of_others_are_checked_by_size_alone(tmp_path):
    vtab_lists(tmp_path / "svhn")
    told = small("vtab-1k", "svhn", classes=2, train=8, val=2, test=6)
    found = open_data(told.data("svhn", tmp_path)["path"])
    told.check("svhn", found)
    told.check("svhn", open_data(tmp_path / "svhn", train_list="train800val200.txt"))
    wrong = small("vtab-1k", "svhn", classes=3, train=8, val=2, test=7)
    with pytest.raises(DataError, match="classes 2 instead of 3, test 6 instead of 7"):
        wrong.check("svhn", found)
    with pytest.raises(DataError, match="train and val 10 instead of 11, val 2 instead of 3"):
        small("vtab-1k", "svhn", classes=2, train=8, val=3, test=6).check("svhn", found)


def test_train_and_val_together_are_the_list_of_the_thousand(tmp_path):
    vtab_lists(tmp_path)
    whole, listed = open_data(tmp_path).whole, open_data(tmp_path, train_list="train800val200.txt").train
    assert (whole.names, whole.labels) == (listed.names, listed.labels)


# Building


def class_folders(root, counts, splits=("train", "test"), start=0):
    for split in splits:
        for name, count in counts.items():
            for _ in range(count):
                start += 1
                put(root, f"{split}/{name}/{start}.png", jpeg(start, "PNG"))


def test_a_built_task_trains_as_it_is_and_has_no_overlap(tmp_path):
    class_folders(tmp_path / "from", {"a": 30, "b": 20})
    told = small("vtab-1k", "cifar100", classes=2, train=8, val=2, test=50)
    manifest = build(told, "cifar", tmp_path / "from", tmp_path / "to")
    found = open_data(told.data("cifar100", tmp_path / "to")["path"])
    told.check("cifar100", found)
    assert found.classes == ("a", "b")
    assert [len(found.train), len(found.val), len(found.test)] == [8, 2, 50]
    assert len(set(contents(found.train) + contents(found.val) + contents(found.test))) == 60
    assert Counter(found.whole.labels) == {0: 6, 1: 4}  # stratified
    assert manifest["train"]["digest"] == found.train.digest
    assert json.loads((tmp_path / "to" / "cifar100" / "manifest.json").read_text()) == manifest
    listed = open_data(tmp_path / "to" / "cifar100", train_list="train800val200.txt").train
    assert (listed.names, listed.labels) == (found.whole.names, found.whole.labels)


def test_the_same_pictures_give_the_same_bytes_from_the_binary_version_from_folders_and_from_zips(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    names = ["apple", "bear", "cat"]
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for i, picture in enumerate(pixels):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG")
            name = f"{'train' if i < 45 else 'test'}/{names[i % 3]}/{i}.png"
            put(tmp_path / "folders", name, file.getvalue())
            archive.writestr(name, file.getvalue())
    for split, rows in (("train", range(45)), ("test", range(45, 60))):
        body = b"".join(bytes([9, i % 3]) + pixels[i].transpose(2, 0, 1).tobytes() for i in rows)
        put(tmp_path / "binary", f"cifar-100-binary/{split}.bin", body)
    put(tmp_path / "binary", "cifar-100-binary/fine_label_names.txt", "\n".join(names) + "\n")

    told = small("vtab-1k", "cifar100", classes=3, train=8, val=4, test=15)
    made = [build(told, "cifar100", tmp_path / source, tmp_path / f"to-{source}")
            for source in ("folders", "z.zip", "binary")]  # fmt: skip
    digests = [[manifest[split]["digest"] for split in ("train", "val", "test")] for manifest in made]
    assert digests[0] == digests[1] == digests[2]
    found = open_data(tmp_path / "to-binary" / "cifar100").test
    back = {np.asarray(decode(path)).tobytes(): label for path, label in zip(found.paths, found.labels, strict=True)}
    assert back == {pixels[i].tobytes(): i % 3 for i in range(45, 60)}


def test_the_pickled_version_of_cifar_is_refused(tmp_path):
    put(tmp_path, "cifar-10-batches-py/data_batch_1", b"\x80\x02}q\x00.")
    with pytest.raises(DataError, match="pickled version of CIFAR, which is never opened: take the binary"):
        build(protocol("kronecker"), "cifar10", tmp_path, tmp_path / "to")


def test_duplicates_are_counted_and_left_out_of_the_thousand_while_test_stays_whole(tmp_path):
    class_folders(tmp_path / "from", {"a": 10, "b": 10})
    put(tmp_path / "from", "train/a/again.png", jpeg(1, "PNG"))  # in train, twice
    put(tmp_path / "from", "train/b/leak.png", jpeg(21, "PNG"))  # in test too
    put(tmp_path / "from", "test/b/again.png", jpeg(22, "PNG"))  # in test, twice, with two labels
    thousand = small("vtab-1k", "cifar100", classes=2, train=16, val=4, test=21)
    manifest = build(thousand, "cifar100", tmp_path / "from", tmp_path / "to")
    assert manifest["notes"][0] == "1 training pictures are byte for byte in test, 1 are repeated in training"
    assert manifest["notes"][1] == "1 are repeated in test, which is whole"
    found = open_data(tmp_path / "to" / "cifar100")
    assert len(found.test) == 21
    assert len(set(contents(found.whole))) == 20
    assert not set(contents(found.whole)) & set(contents(found.test))

    whole = small("kronecker", "cifar100", classes=2, train=18, val=4, test=21)
    build(whole, "cifar100", tmp_path / "from", tmp_path / "full")
    full = open_data(tmp_path / "full" / "cifar100")
    assert not set(contents(full.train)) & set(contents(full.val))
    assert len(full.whole) == 22  # as its owners give it away
    assert any("1 of 21 pictures of test are byte for byte in" in note for note in full.notes)


def test_a_build_is_whole_or_not_at_all(tmp_path):
    class_folders(tmp_path / "from", {"a": 10, "b": 10})
    told = small("vtab-1k", "cifar100", classes=2, train=8, val=2, test=19)
    with pytest.raises(DataError, match="is not that of vtab-1k: test 20 instead of 19"):
        build(told, "cifar100", tmp_path / "from", tmp_path / "to")
    with pytest.raises(DataError, match="has 2 classes, cifar100 has 3"):
        build(small("vtab-1k", "cifar100", classes=3, train=8, val=2, test=20), "cifar100", tmp_path / "from", tmp_path)
    put(tmp_path, "from/train/a/torn.png", b"\x89PNG torn")
    with pytest.raises(DataError, match=r"cannot be decoded|damaged"):
        build(told, "cifar100", tmp_path / "from", tmp_path / "to")
    assert not (tmp_path / "to").exists() or not list((tmp_path / "to").iterdir())
    (tmp_path / "to" / "cifar100").mkdir(parents=True)
    with pytest.raises(DataError, match="exists; remove it"):
        build(told, "cifar100", tmp_path / "from", tmp_path / "to")


def test_a_changed_picture_is_found_by_its_digest(tmp_path):
    class_folders(tmp_path / "from", {"a": 10, "b": 10})
    told = small("vtab-1k", "cifar100", classes=2, train=8, val=2, test=20)
    build(told, "cifar100", tmp_path / "from", tmp_path)
    found = open_data(tmp_path / "cifar100")
    strange = dataclasses.replace(told, tasks=(dataclasses.replace(told.tasks[0], golden={"val": "0" * 64}),))
    with pytest.raises(DataError, match=r"digest [0-9a-f]{12}, in vtab-1k it was 000000000000"):
        strange.check("cifar100", found)
    found.test.paths[3].write_bytes(jpeg(999, "PNG"))
    with pytest.raises(DataError, match=r"test of cifar100 .* when it was built it was .* build again"):
        told.check("cifar100", open_data(tmp_path / "cifar100"))


def test_what_no_reader_serves_says_why(tmp_path):
    with pytest.raises(DataError, match="dmlab is not built here: its owners give away TFRecord"):
        build(protocol("vtab-1k"), "dmlab", tmp_path, tmp_path / "to")


def test_tables_that_are_not_as_described_are_one_line(tmp_path):
    put(tmp_path, "images/Abyssinian_1.jpg", jpeg(1))
    put(tmp_path, "annotations/trainval.txt", "Abyssinian_1 one\n")
    put(tmp_path, "annotations/test.txt", "Abyssinian_2\n")
    with pytest.raises(DataError, match="are not those of Oxford-IIIT Pets: ValueError"):
        build(protocol("vtab-1k"), "pets", tmp_path, tmp_path / "to")
    put(tmp_path, "CLEVR_train_scenes.json", '{"scenes": [{"objects": 3}]}')
    with pytest.raises(DataError, match="are not those of CLEVR, number of objects: TypeError"):
        build(protocol("vtab-1k"), "clevr_count", tmp_path, tmp_path / "to")


def test_a_picture_without_a_label_is_refused(tmp_path):
    class_folders(tmp_path / "from", {"a": 10, "b": 10})
    told = small("vtab-1k", "cifar100", classes=2, train=8, val=2, test=20)
    reader = READERS["cifar"]

    def unlabelled(tree, **options):
        official = reader(tree, **options)
        official.test[0].label = -1
        return official

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, "cifar", unlabelled)
        with pytest.raises(DataError, match="has a picture of class -1, not 0 to 1"):
            build(told, "cifar100", tmp_path / "from", tmp_path / "to")


def made(tmp_path, name, task, source, **sizes):
    """The task built from a source, opened; its pictures by content."""
    told = small(name, task, **sizes)
    build(told, task, source, tmp_path / "to")
    return open_data(told.data(task, tmp_path / "to")["path"])


def by_content(split):
    return dict(zip(contents(split), split.labels, strict=True))


def sha(data):
    return hashlib.sha256(data).hexdigest()


def test_svhn_reads_its_mat_files_and_ten_is_the_digit_0(tmp_path):
    scipy = pytest.importorskip("scipy.io")
    rng = np.random.default_rng(0)
    x = {"train": rng.integers(0, 256, (32, 32, 3, 40), dtype=np.uint8),
         "test": rng.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)}  # fmt: skip
    for split, pixels in x.items():
        y = (np.arange(pixels.shape[3]) % 10 + 1)[:, None].astype(np.uint8)
        scipy.savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": y}, do_compression=split == "train")
    found = made(tmp_path, "vtab-1k", "svhn", tmp_path, classes=10, train=20, val=5, test=20)
    assert by_content(found.test) == {sha(png(x["test"][..., i])): (i % 10 + 1) % 10 for i in range(20)}


def test_flowers_take_the_official_splits_and_ids(tmp_path):
    scipy = pytest.importorskip("scipy.io")
    labels = np.arange(30) % 3 + 1
    scipy.savemat(tmp_path / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    ids = {"trnid": np.arange(1, 13), "valid": np.arange(13, 19), "tstid": np.arange(19, 31)}
    scipy.savemat(tmp_path / "setid.mat", {key: value[None].astype(np.uint16) for key, value in ids.items()})
    for i in range(1, 31):
        put(tmp_path, f"jpg/image_{i:05d}.jpg", jpeg(i))
    found = made(tmp_path, "fgvc", "flowers102", tmp_path, classes=3, train=12, val=6, test=12)
    assert by_content(found.val) == {sha(jpeg(i)): labels[i - 1] - 1 for i in range(13, 19)}
    assert by_content(found.test) == {sha(jpeg(i)): labels[i - 1] - 1 for i in range(19, 31)}


def test_pets_dtd_aircraft_and_splits_of_coop(tmp_path):
    rows = {"trainval": [], "test": []}
    for i in range(24):
        name = ("Abyssinian", "yorkshire_terrier")[i % 2]
        rows["trainval" if i < 16 else "test"].append(f"{name}_{i} {i % 2 + 1} 1 1\n")
        put(tmp_path / "pets", f"images/{name}_{i}.jpg", jpeg(i))
    for split, lines in rows.items():
        put(tmp_path / "pets", f"annotations/{split}.txt", "".join(lines))
    found = made(tmp_path, "vtab-1k", "pets", tmp_path / "pets", classes=2, train=8, val=4, test=8)
    assert found.classes == ("Abyssinian", "yorkshire_terrier")
    assert by_content(found.test) == {sha(jpeg(i)): i % 2 for i in range(16, 24)}

    splits = {"train": range(8), "val": range(8, 12), "test": range(12, 16)}
    for split, numbers in splits.items():
        put(tmp_path / "dtd", f"labels/{split}1.txt", "".join(f"{'ab'[i % 2]}/{i}.jpg\n" for i in numbers))
        put(tmp_path / "planes", f"data/images_variant_{split}.txt",
            "".join(f"{i:07d} {('707-320', 'A340 300')[i % 2]}\n" for i in numbers))  # fmt: skip
    put(tmp_path / "planes", "data/variants.txt", "707-320\nA340 300\n")
    for i in range(16):
        put(tmp_path / "dtd", f"images/{'ab'[i % 2]}/{i}.jpg", jpeg(i))
        put(tmp_path / "planes", f"data/images/{i:07d}.jpg", jpeg(i))
    sizes = {"classes": 2, "train": 8, "val": 4, "test": 4}
    expected = {sha(jpeg(i)): i % 2 for i in range(12, 16)}
    assert by_content(made(tmp_path, "elevater-5-shot", "dtd", tmp_path / "dtd", **sizes).test) == expected
    assert by_content(made(tmp_path, "few-shot", "aircraft", tmp_path / "planes", **sizes).test) == expected

    said = {split: [[f"{'ab'[i % 2]}/{i}.jpg", i % 2, "cake"] for i in numbers] for split, numbers in splits.items()}
    put(tmp_path / "dtd", "split_zhou_Food101.json", json.dumps(said))
    found = made(tmp_path, "few-shot", "food101", tmp_path / "dtd", **sizes)
    assert found.classes == ("cake 0", "cake 1")
    assert by_content(found.test) == expected
    put(
        tmp_path / "dtd",
        "split_zhou_StanfordCars.json",
        '{"train": [["../../etc/passwd", 0, "x"]], "val": [], "test": []}',
    )
    with pytest.raises(DataError, match="has no "):
        made(tmp_path, "few-shot", "cars", tmp_path / "dtd", **sizes)


def test_birds_dogs_and_cars_read_their_tables(tmp_path):
    scipy = pytest.importorskip("scipy.io")
    folder = {0: "001.Albatross", 1: "017.Cardinal"}
    files = [f"{folder[i % 2]}/{i}.jpg" for i in range(20)]
    put(tmp_path / "cub", "images.txt", "".join(f"{i + 1} {name}\n" for i, name in enumerate(files)))
    put(tmp_path / "cub", "image_class_labels.txt", "".join(f"{i + 1} {(1, 17)[i % 2]}\n" for i in range(20)))
    put(tmp_path / "cub", "train_test_split.txt", "".join(f"{i + 1} {int(i < 12)}\n" for i in range(20)))
    put(tmp_path / "cub", "classes.txt", "1 Albatross\n2 a parent of others\n17 Northern Cardinal\n")
    for i, name in enumerate(files):
        put(tmp_path / "cub", f"images/{name}", jpeg(i))
    expected = {sha(jpeg(i)): i % 2 for i in range(12, 20)}
    found = made(tmp_path, "fgvc", "cub", tmp_path / "cub", classes=2, train=10, val=2, test=8)
    assert found.classes == ("Albatross", "Northern Cardinal")
    assert by_content(found.test) == expected

    for split, numbers in (("train", range(12)), ("test", range(12, 20))):
        cell = np.empty((len(numbers), 1), object)
        cell[:, 0] = [f"n0{i % 2}-Terrier{i % 2}/{i}.jpg" for i in numbers]
        (tmp_path / "dogs").mkdir(exist_ok=True)
        scipy.savemat(
            tmp_path / "dogs" / f"{split}_list.mat", {"file_list": cell, "labels": np.ones((len(numbers), 1))}
        )
    for i in range(20):
        put(tmp_path / "dogs", f"Images/n0{i % 2}-Terrier{i % 2}/{i}.jpg", jpeg(i))
    found = made(tmp_path, "fgvc", "dogs", tmp_path / "dogs", classes=2, train=10, val=2, test=8)
    assert found.classes == ("Terrier0", "Terrier1")
    assert by_content(found.test) == expected

    rows = np.zeros((1, 20), dtype=[(key, "O") for key in ("relative_im_path", "bbox_x1", "class", "test")])
    for i in range(20):
        rows[0, i] = (f"car_ims/{i:06d}.jpg", 3.0, np.uint8(i % 2 + 1), np.uint8(i >= 12))
        put(tmp_path / "cars", f"car_ims/{i:06d}.jpg", jpeg(i))
    names = np.empty((1, 2), object)
    names[0] = ["Audi S4", "BMW M3"]
    scipy.savemat(tmp_path / "cars" / "cars_annos.mat", {"annotations": rows, "class_names": names})
    found = made(tmp_path, "fgvc", "cars", tmp_path / "cars", classes=2, train=10, val=2, test=8)
    assert found.classes == ("Audi S4", "BMW M3")
    assert by_content(found.test) == expected


def test_sets_without_an_official_test_get_one_of_the_protocols_size(tmp_path):
    for i in range(60):
        put(tmp_path / "from", f"{'ABC'[i % 3]}/{i}.jpg", jpeg(i))
    found = made(tmp_path, "vtab-1k", "eurosat", tmp_path / "from", classes=3, train=12, val=6, test=12)
    assert Counter(found.test.labels) == {0: 4, 1: 4, 2: 4}
    found = made(tmp_path, "vtab-1k", "caltech101", tmp_path / "from", classes=3, train=12, val=6, test=30,
                 options={"per_class": 10})  # fmt: skip
    assert Counter(found.test.labels) == {0: 10, 1: 10, 2: 10}


def norb_file(values):
    magic = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}[values.dtype.name]
    shape = [*values.shape, *[1] * (3 - values.ndim)]
    return struct.pack(f"<II{len(shape)}I", magic, values.ndim, *shape) + values.tobytes()


def test_smallnorb_has_the_first_camera_and_halves_the_official_test(tmp_path):
    rng = np.random.default_rng(0)
    pictures = {}
    stems = {"train": "5x46789x9x18x6x2x96x96-training", "test": "5x01235x9x18x6x2x96x96-testing"}
    for split, stem, count in (("train", stems["train"], 36), ("test", stems["test"], 72)):
        pixels = rng.integers(0, 256, (count, 2, 6, 6), dtype=np.uint8)
        info = np.array([[i % 5, i % 9, 2 * (i % 18), i % 6] for i in range(count)], np.int32)
        put(tmp_path, f"smallnorb-{stem}-dat.mat.gz", gzip.compress(norb_file(pixels)))
        put(tmp_path, f"smallnorb-{stem}-info.mat", norb_file(info))
        pictures |= {sha(png(pixels[i, 0])): (split, i % 18, i % 9) for i in range(count)}
    found = made(tmp_path, "vtab-1k", "smallnorb_azi", tmp_path, classes=18, train=18, val=9, test=36)
    assert {pictures[key][0] for key in contents(found.train)} == {"train"}
    assert {pictures[key][0] for key in contents(found.val) + contents(found.test)} == {"test"}
    assert all(pictures[key][1] == label for key, label in by_content(found.test).items())
    found = made(tmp_path, "vtab-1k", "smallnorb_ele", tmp_path, classes=9, train=18, val=9, test=36)
    assert all(pictures[key][2] == label for key, label in by_content(found.train).items())


def test_dsprites_join_neighbouring_values_to_16_classes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2, (320, 12, 12), dtype=np.uint8)
    latents = np.array([[0, 0, 0, i % 40, i % 32, 0] for i in range(320)])
    file = tmp_path / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    np.savez(file, imgs=pixels, latents_classes=latents)
    number = {sha(png(picture * np.uint8(255))): i for i, picture in enumerate(pixels)}
    found = made(tmp_path, "vtab-1k", "dsprites_loc", tmp_path, classes=16, train=40, val=16, test=32)
    assert all(label == (number[key] % 32) // 2 for key, label in by_content(found.test).items())
    found = made(tmp_path, "vtab-1k", "dsprites_ori", tmp_path, classes=16, train=40, val=16, test=32)
    assert all(label == int((number[key] % 40) / 2.5) for key, label in by_content(found.test).items())
    np.savez(
        tmp_path / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", imgs=np.array([{}], object), latents_classes=0
    )
    with pytest.raises(DataError, match=r"not the \.npz of dSprites"):
        build(protocol("vtab-1k"), "dsprites_loc", tmp_path, tmp_path / "again")


def test_clevr_counts_objects_and_bins_the_nearest(tmp_path):
    depths = [7.0, 8.0, 8.1, 8.5, 8.9, 9.2, 9.7, 10.0, 10.1, 12.0]
    bins = [0, 0, 1, 1, 2, 3, 4, 4, 5, 5]  # VTAB: the number of 8, 8.5, 9, 9.5, 10 that are below
    for split, count in (("train", 120), ("val", 30)):
        scenes = []
        for i in range(count):
            near = {"pixel_coords": [1, 1, depths[i % 10]]}
            scenes.append({"image_filename": f"CLEVR_{split}_{i:06d}.png",
                           "objects": [near] + [{"pixel_coords": [0, 0, 20.0]}] * (i % 8 + 2)})  # fmt: skip
            put(
                tmp_path,
                f"CLEVR_v1.0/images/{split}/CLEVR_{split}_{i:06d}.png",
                jpeg(i + 1000 * (split == "val"), "PNG"),
            )
        put(tmp_path, f"CLEVR_v1.0/scenes/CLEVR_{split}_scenes.json", json.dumps({"scenes": scenes}))
    number = {sha((tmp_path / f"CLEVR_v1.0/images/val/CLEVR_val_{i:06d}.png").read_bytes()): i for i in range(30)}
    found = made(tmp_path, "vtab-1k", "clevr_count", tmp_path, classes=8, train=24, val=8, test=30)
    assert by_content(found.test) == {key: i % 8 for key, i in number.items()}
    found = made(tmp_path, "vtab-1k", "clevr_dist", tmp_path, classes=6, train=24, val=6, test=30)
    assert by_content(found.test) == {key: bins[i % 10] for key, i in number.items()}


def test_camelyon_reads_hdf5_or_says_what_it_needs(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"train": 20, "valid": 10, "test": 10}
    pixels = {split: rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8) for split, count in sizes.items()}
    try:
        import h5py
    except ImportError:
        with pytest.raises(DataError, match="pip install h5py"):
            build(protocol("vtab-1k"), "camelyon", tmp_path, tmp_path / "to")
        pytest.skip("h5py is not installed: its absence was tested, its files were not")
    for split, x in pixels.items():
        for kind, values in (("x", x), ("y", np.arange(len(x)).reshape(-1, 1, 1, 1) % 2)):
            with h5py.File(tmp_path / f"camelyonpatch_level_2_split_{split}_{kind}.h5", "w") as file:
                file[kind] = values
    found = made(tmp_path, "vtab-1k", "camelyon", tmp_path, classes=2, train=8, val=4, test=10)
    assert by_content(found.test) == {sha(png(x)): i % 2 for i, x in enumerate(pixels["test"])}


def test_a_table_of_the_hub_or_the_line_that_says_what_it_needs(tmp_path):
    told = small("vtab-1k", "eurosat", classes=2, train=8, val=4, test=10)
    try:
        import datasets
    except ImportError:
        with pytest.raises(DataError, match="pip install datasets"):
            build(told, "eurosat", "hf:someone/eurosat", tmp_path / "to")
        pytest.skip("datasets is not installed: its absence was tested, its tables were not")
    assert datasets.__version__
    import pyarrow
    import pyarrow.parquet

    features = {"image": {"_type": "Image"}, "label": {"names": ["field", "sea"], "_type": "ClassLabel"}}
    for split, start, count in (("train", 0, 20), ("test", 100, 10)):
        pictures = [{"bytes": jpeg(start + i), "path": None} for i in range(count)]
        table = pyarrow.table({
            "image": pyarrow.array(pictures, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})),
            "label": pyarrow.array([i % 2 for i in range(count)], pyarrow.int64()),
        })  # fmt: skip
        (tmp_path / "hub").mkdir(exist_ok=True)
        said = {"huggingface": json.dumps({"info": {"features": features}})}
        pyarrow.parquet.write_table(table.replace_schema_metadata(said), tmp_path / "hub" / f"{split}.parquet")
    build(told, "eurosat", f"hf:{tmp_path / 'hub'}", tmp_path / "to")
    found = open_data(tmp_path / "to" / "eurosat")
    assert found.classes == ("field", "sea")
    assert by_content(found.test) == {sha(jpeg(100 + i)): i % 2 for i in range(10)}


# Formats


@given(st.integers(1, 40), st.integers(1, 3000), st.booleans(), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_a_png_of_ours_decodes_to_its_pixels(height, width, grey, seed):
    pixels = np.random.default_rng(seed).integers(
        0, 256, (height, width) if grey else (height, width, 3), dtype=np.uint8
    )
    back = np.asarray(decode(png(pixels)))
    assert (back == (pixels[..., None] if grey else pixels)).all()


def test_a_png_of_ours_never_changes():
    assert sha(png(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))) == (
        "bc174d682fa5422e2d86e5538f5a8ad4edf2b3c247ca829f078e66981657ecd7"
    )


@pytest.mark.parametrize("compressed", [False, True])
def test_mat_files_read_as_scipy_wrote_them(compressed):
    scipy = pytest.importorskip("scipy.io")
    file = io.BytesIO()
    cell = np.empty((1, 2), object)
    cell[0] = ["a/b.jpg", np.array([[1.5, 2.0]])]
    rows = np.zeros((1, 2), dtype=[("name", "O"), ("class", "O")])
    rows[0, 0], rows[0, 1] = ("x", np.uint8(3)), ("grün", np.uint16(400))
    numbers = {kind: np.arange(24).reshape(2, 3, 4).astype(kind) for kind in ("u1", "i2", "u2", "i4", "f4", "f8")}
    scipy.savemat(file, {"cell": cell, "rows": rows, "text": "hello"} | numbers, do_compression=compressed)
    found = mat(file.getvalue(), "x.mat")
    assert all((found[kind] == values).all() for kind, values in numbers.items())
    assert found["text"] == "hello"
    assert found["cell"][0] == "a/b.jpg"
    assert found["cell"][1].tolist() == [[1.5, 2.0]]
    assert [(row["name"], row["class"].item()) for row in found["rows"]] == [("x", 3), ("grün", 400)]


def test_damaged_matrices_are_one_line():
    scipy = pytest.importorskip("scipy.io")
    file = io.BytesIO()
    scipy.savemat(file, {"x": np.arange(50.0)})
    whole = file.getvalue()
    for end in (0, 100, 140, 190, len(whole) - 9):
        with pytest.raises(DataError, match=r"x\.mat is not a MATLAB 5 file"):
            mat(whole[:end], "x.mat")
    with pytest.raises(DataError, match="save it again with -v7"):
        mat(b"MATLAB 7.3 MAT-file, ...".ljust(200), "x.mat")
    with pytest.raises(DataError, match="not a NORB matrix"):
        norb(norb_file(np.zeros((4, 5), np.uint8))[:-1], "x.mat")
    with pytest.raises(DataError, match="not a NORB matrix"):
        norb(struct.pack("<II4I", 0x1E3D4C55, 4, 2**31, 2**31, 2**31, 2**31), "x.mat")


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_a_matrix_reader_fail_otherwise(data):
    for reader, head in ((mat, b"".ljust(126) + b"IM"), (norb, struct.pack("<I", 0x1E3D4C54))):
        with contextlib.suppress(DataError):
            reader(head + data, "x")


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "a\\..\\x.png", "C:/x.png"])
def test_a_zip_entry_that_leaves_its_folder_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("train/a/1.png", jpeg(1))
        archive.writestr(zipfile.ZipInfo(name), jpeg(2))
    with pytest.raises(DataError, match="leaves the folder"):
        Tree(tmp_path)


def test_links_and_large_entries_of_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("train/a/1.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="has a link"):
        Tree(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.png", bytes(2**20))
    with pytest.raises(DataError, match="more than 1,000 bytes"):
        Tree(tmp_path / "b.zip").read("big.png", 1000)
    put(tmp_path, "c.tar.gz", b"\x1f\x8b")
    with pytest.raises(DataError, match="unpack other archives first"):
        Tree(tmp_path / "c.tar.gz")


def test_links_in_a_folder_are_not_followed(tmp_path):
    put(tmp_path, "secret/x.png", jpeg(1))
    put(tmp_path, "from/train/a/1.png", jpeg(2))
    (tmp_path / "from" / "train" / "a" / "2.png").symlink_to(tmp_path / "secret" / "x.png")
    (tmp_path / "from" / "train" / "b").symlink_to(tmp_path / "secret")
    assert Tree(tmp_path / "from").names == ["train/a/1.png"]


# The command line


def call(*arguments):
    app = typer.Typer()
    app.add_typer(commands)
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def test_list_prints_all_protocols_and_json_has_all_facts():
    shown = call("list").output
    assert all(name in shown for name in protocols())
    values = json.loads(call("list", "vtab-1k", "--json").stdout)["protocols"]
    assert list(values) == ["vtab-1k"]
    assert values["vtab-1k"]["tasks"]["sun397"]["test"] == 21_750


def test_build_and_check_on_the_command_line(tmp_path, monkeypatch):
    class_folders(tmp_path / "from", {"a": 10, "b": 10})
    told = small("vtab-1k", "cifar100", classes=2, train=8, val=2, test=20)
    told = dataclasses.replace(told, tasks=(*told.tasks, protocol("vtab-1k").task("dtd")))
    monkeypatch.setattr("deltavit.cli.data.protocol", lambda name: told)
    done = call("build", "vtab-1k", "cifar100", "--from", tmp_path / "from", "--to", tmp_path / "to", "--json")
    assert done.exit_code == 0, done.output
    manifest = json.loads(done.stdout.splitlines()[-1])
    assert manifest["test"]["size"] == 20
    done = call("check", "vtab-1k", tmp_path / "to", "--json")
    assert done.exit_code == 1
    tasks = json.loads(done.stdout.splitlines()[-1])["tasks"]
    assert {name: state["state"] for name, state in tasks.items()} == {"cifar100": "good", "dtd": "missing"}
    assert tasks["cifar100"]["val"] == manifest["val"]


# The real thing


needs_cifar = pytest.mark.skipif(not FULL.is_dir(), reason="../shared/data_full is not beside this checkout")


@needs_cifar
def test_the_thousand_of_cifar100_is_the_one_on_record(tmp_path):
    told = protocol("vtab-1k")
    build(told, "cifar100", FULL, tmp_path)
    found = open_data(told.data("cifar100", tmp_path)["path"])
    told.check("cifar100", found)
    assert {part.name: part.digest for part in (found.train, found.val, found.test)} == told.task("cifar100").golden
    assert Counter(found.test.labels) == dict.fromkeys(range(100), 100)
    assert set(Counter(found.train.labels).values()) <= {7, 8, 9}
    keys = [set(contents(part)) for part in (found.train, found.val, found.test)]
    assert [len(part) for part in keys] == [800, 200, 9_998]  # two pictures of the official test are in it twice
    assert len(set.union(*keys)) == 10_998
    assert found.notes == []


@pytest.mark.slow
@needs_cifar
def test_full_cifar100_keeps_every_picture_and_is_the_one_on_record(tmp_path):
    told = protocol("kronecker")
    manifest = build(told, "cifar100", FULL, tmp_path)
    assert {name: manifest[name]["digest"] for name in ("train", "val", "test")} == told.task("cifar100").golden
    # 26 groups of equal pictures: 10 across train and test, 14 within train, 2 within test
    assert manifest["notes"] == [
        "10 training pictures are byte for byte in test, 14 are repeated in training",
        "2 are repeated in test, which is whole",
    ]
    found = open_data(tmp_path / "cifar100")
    assert Counter(found.whole.labels) == dict.fromkeys(range(100), 500)
    assert not set(contents(found.train)) & set(contents(found.val))
