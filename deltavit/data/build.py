"""Builds the data of a task, without TensorFlow, from the files that the owners of the data set give away.

A reader knows one owner's files and says what the official splits are; the cut is the same for all.  What comes out is
the layout of lists (`deltavit.data.layouts`), so it trains as it is:

    NAME/images/train/007/3fa9...c2.png     a picture, named by its SHA-256
    NAME/train800.txt val200.txt test.txt   a path and a label a line; train.txt and val.txt where all is used
    NAME/classes.txt manifest.json

The cut is ours: the order of TensorFlow Datasets, from which VTAB-1k took its first 800 and 200, cannot be had without
it.  Ours depends on the bytes of the pictures alone, not on names or on the order of files.
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ..core.errors import DataError, unknown
from .decode import decode, shown
from .formats import Array, Tree, mat, norb, png, suffix
from .layouts import SPLIT_NAMES, SUFFIXES, open_data
from .protocols import CUT, EMBEDDED, LISTS_ONLY, MANIFEST, Protocol, Task
from .splits import cut

HUB = "hf:"
HUB_SPLITS = {**SPLIT_NAMES, "dev": "val"}


@dataclass
class Picture:
    """A label, and a way to the bytes of the file as we shall write it."""

    label: int
    load: Callable[[], bytes]

    @cached_property
    def key(self) -> str:
        """SHA-256 of those bytes."""
        return hashlib.sha256(self.load()).hexdigest()


@dataclass
class Official:
    """What the owner says: names of the classes, and the splits; no test where there is none."""

    classes: list[str]
    train: list[Picture]
    val: list[Picture] = field(default_factory=list)
    test: list[Picture] = field(default_factory=list)


Reader = Callable[..., Official]


def build(protocol: Protocol, task: str, source: str | Path, root: str | Path) -> dict[str, Any]:
    """Make ROOT/TASK, whole or not at all.

    Args:
        source: the folder or zip with the owner's files, or hf:NAME for a data set that `datasets` can load.

    Returns:
        The manifest: sizes, digests, what was read, duplicates, and how it was cut.

    Raises:
        DataError: ROOT/TASK exists, files are missing or damaged, sizes that are not the protocol's, or a full disk.
    """
    told, target = protocol.task(task), Path(root) / protocol.task(task).name
    if target.exists():
        raise DataError(f"{shown(target)} exists; remove it, or build somewhere else")
    official, read_from = _read(told, source)
    if len(official.classes) != told.classes:
        raise DataError(f"{shown(Path(source))} has {len(official.classes)} classes, {told.name} has {told.classes}")
    for picture in (*official.train, *official.val, *official.test):
        if not 0 <= picture.label < told.classes:
            raise DataError(
                f"{shown(Path(source))} has a picture of class {picture.label}, not 0 to {told.classes - 1}"
            )
    splits, notes = _cut(official, told, thousand=protocol.cut == "thousand")
    temporary = target.parent / f".building-{secrets.token_hex(6)}"
    try:
        _write(temporary, official.classes, splits, thousand=protocol.cut == "thousand")
        dataset = open_data(temporary)  # what will be read is what is recorded
        manifest = {
            "format": 1,
            "protocol": protocol.name,
            "task": told.name,
            "cut": CUT,
            "source": {"kind": told.builder if not str(source).startswith(HUB) else str(source), "tables": read_from},
            "classes": len(dataset.classes),
            **{part.name: {"size": len(part), "digest": part.digest}
               for part in (dataset.train, dataset.val, dataset.test) if part is not None},
            "notes": notes,
        }  # fmt: skip
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
        protocol.check(told.name, dataset)
        temporary.rename(target)
    except OSError as error:
        raise DataError(f"{shown(target)} cannot be written: {error.strerror or error}; nothing was left") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _read(task: Task, source: str | Path) -> tuple[Official, dict[str, str]]:
    if str(source).startswith(HUB):
        return hub(str(source).removeprefix(HUB), task.hub_label), {}
    if task.builder == LISTS_ONLY:
        raise DataError(f"{task.name} is not built here: {task.notes or 'there is no reader for it'}")
    if task.builder == EMBEDDED:
        raise DataError(f"{task.name} comes with {EMBEDDED}: `deltavit bench` makes its files by itself")
    if task.builder not in READERS:
        raise DataError(unknown("reader", task.builder, READERS))
    tree = Tree(source)
    try:
        return READERS[task.builder](tree, **task.options), tree.read_from
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:  # tables that are not as described
        raise DataError(f"the files in {shown(tree.source)} are not those of {task.title}: {error!r:.200}") from error


# The cut


def _cut(official: Official, task: Task, thousand: bool) -> tuple[dict[str, list[Picture]], list[str]]:
    """Train, val and test.

    Test is whole, with whatever exact duplicates of training pictures it has; those are counted, and in a cut of a
    thousand left out of what is trained on.
    """
    train, val, test = official.train, official.val, official.test
    if not test:
        train, test = _part(train, task.test)
    keys = {picture.key for picture in test}
    shared = [picture for picture in (*train, *val) if picture.key in keys]
    repeated = len(train) + len(val) - len({picture.key for picture in (*train, *val)})
    notes = [
        f"{len(shared)} training pictures are byte for byte in test, {repeated} are repeated in training",
        f"{len(test) - len(keys)} are repeated in test, which is whole",
    ]
    if thousand:
        train, val = _once(train, keys), _once(val, keys)
        if not val:
            train = _some(train, task.train + task.val)
            train, val = _part(train, task.val)
        else:
            train = _some(train, task.train)
            val = _part(_once(val, {picture.key for picture in train}), task.val)[1]
        notes.append("the thousand has none of them")
    elif not val:
        train, val = _part(train, task.val)
    parts = {"train": train, "val": val, "test": test}
    return {name: sorted(part, key=lambda p: (p.label, p.key)) for name, part in parts.items()}, notes


def _once(pictures: Iterable[Picture], known: set[str]) -> list[Picture]:
    """Each different picture that is not known, the one with the lowest label of equal ones."""
    first: dict[str, Picture] = {}
    for picture in sorted(pictures, key=lambda p: p.label):
        if picture.key not in known:
            first.setdefault(picture.key, picture)
    return list(first.values())


def _some(pictures: list[Picture], size: int) -> list[Picture]:
    """That many, with at least one of each class."""
    return _part(pictures, len(pictures) - size)[0] if len(pictures) > size else pictures


def _part(pictures: list[Picture], size: int) -> tuple[list[Picture], list[Picture]]:
    """What is left, and a part of exactly that size, stratified.

    Equal pictures stay together, which can shift the size; then the next seed is taken, so the cut stays determined.
    """
    labels, keys = [picture.label for picture in pictures], [picture.key for picture in pictures]
    for seed in range(100):
        rest, part = cut(labels, keys, [size / len(pictures)], seed)
        if len(part) == size:
            return [pictures[i] for i in rest], [pictures[i] for i in part]
    raise DataError(
        f"{len(pictures)} pictures cannot be cut into {len(pictures) - size} and {size}: too many are equal"
    )


# Writing


def _write(root: Path, classes: list[str], splits: dict[str, list[Picture]], thousand: bool) -> None:
    lists = {name: [] for name in splits}  # type: dict[str, list[str]]
    for split, pictures in splits.items():
        seen: Counter[str] = Counter()
        for picture in pictures:
            data = picture.load()
            end = suffix(data)
            if end is None:
                raise DataError(f"a picture of class {classes[picture.label]!r} has no format that we read")
            name = f"images/{split}/{picture.label:03d}/{picture.key[:24]}"
            seen[name] += 1
            name += f"-{seen[name]}{end}" if seen[name] > 1 else end
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            lists[split].append(f"{name} {picture.label}\n")
    names = {"train": "train800.txt", "val": "val200.txt"} if thousand else {}
    for split, lines in lists.items():
        (root / names.get(split, f"{split}.txt")).write_text("".join(lines), "utf-8")
    if thousand:
        (root / "train800val200.txt").write_text("".join(lists["train"] + lists["val"]), "utf-8")
    (root / "classes.txt").write_text("".join(f"{' '.join(name.split())}\n" for name in classes), "utf-8")


# Readers.  Each takes a tree and its options in the protocol, and looks for files by their own names, however deep.


def _file(tree: Tree, name: str) -> bytes:
    """A picture file as it is, but a GIF as PNG."""
    data = tree.read(name)
    if data.startswith(b"GIF8"):
        with Image.open(io.BytesIO(data), formats=("GIF",)) as picture:
            if picture.width * picture.height > 25_000_000:
                raise DataError(f"{name} has {picture.width} x {picture.height} pixels: too many")
            return png(np.asarray(picture.convert("RGB")))
    return data


def _at(tree: Tree, label: int, relative: str) -> Picture:
    return Picture(label, partial(_file, tree, tree.one(relative)))


def _pixels(label: int, take: Callable[[], Array]) -> Picture:
    return Picture(label, lambda: png(take()))


def cifar(tree: Tree, hundred: bool = False) -> Official:
    """The binary version of CIFAR-10 or CIFAR-100, or class folders of PNG; both give the same files."""
    names = ["train.bin"] if hundred else [f"data_batch_{i}.bin" for i in range(1, 6)]
    if tree.find(names[0]):
        words = tree.one("fine_label_names.txt" if hundred else "batches.meta.txt")
        head = 2 if hundred else 1  # CIFAR-100 has the coarse label first
        parts = {"train": names, "test": ["test.bin" if hundred else "test_batch.bin"]}
        found: dict[str, list[Picture]] = {}
        for split, files in parts.items():
            for name in files:
                data = np.frombuffer(tree.table(tree.one(name)), np.uint8)
                if not data.size or data.size % (head + 3072):
                    raise DataError(f"{name} has {data.size:,} bytes, not a multiple of {head + 3072}")
                rows = data.reshape(-1, head + 3072)
                pictures = rows[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                found.setdefault(split, []).extend(
                    _pixels(int(row[head - 1]), partial(pictures.__getitem__, i)) for i, row in enumerate(rows)
                )
        return Official(tree.lines(words), found["train"], test=found["test"])
    if any(tree.find(name) for name in ("data_batch_1", "cifar-100-python/train", "train.pkl")):
        raise DataError(f"{shown(tree.source)} is the pickled version of CIFAR, which is never opened: take the binary")
    official = folders(tree)
    for picture in (*official.train, *official.val, *official.test):
        picture.load = partial(lambda load: png(np.asarray(decode(load()))), picture.load)
    return official


def folders(tree: Tree, per_class: int | None = None) -> Official:
    """Folders of classes, perhaps below folders of splits.

    Args:
        per_class: pictures of each class to train on where there is no test; the others are test, as for Caltech-101.
    """
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in tree.names:
        *parts, last = name.split("/")
        if not parts or PurePosixPath(last).suffix.lower() not in SUFFIXES or any(p.startswith(".") for p in parts):
            continue
        at = next((i for i, part in enumerate(parts[:-1]) if part.lower() in SPLIT_NAMES), None)
        if at is None:
            found["train"].append((parts[-1], name))
        else:
            found[SPLIT_NAMES[parts[at].lower()]].append((parts[at + 1], name))
    classes = sorted({label for items in found.values() for label, _ in items})
    number = {name: i for i, name in enumerate(classes)}
    made = {
        split: [Picture(number[label], partial(_file, tree, name)) for label, name in items]
        for split, items in found.items()
    }
    official = Official(classes, made.get("train", []), made.get("val", []), made.get("test", []))
    if not official.train:
        raise DataError(f"no class folders with pictures to train on in {shown(tree.source)}")
    return official if per_class is None else _each(official, per_class)


def _each(official: Official, size: int) -> Official:
    groups: dict[int, list[Picture]] = defaultdict(list)
    for picture in sorted(official.train, key=lambda picture: picture.key):
        groups[picture.label].append(picture)
    few = [official.classes[label] for label, own in groups.items() if len(own) <= size]
    if few:
        raise DataError(f"class {few[0]!r} has no more than {size} pictures")
    return Official(
        official.classes,
        [picture for own in groups.values() for picture in own[:size]],
        test=[picture for own in groups.values() for picture in own[size:]],
    )


def svhn(tree: Tree) -> Official:
    """`train_32x32.mat`, `test_32x32.mat`: X is [32, 32, 3, n], and the digit 0 has the label 10."""
    parts = {}
    for split in ("train", "test"):
        name = tree.one(f"{split}_32x32.mat")
        values = mat(tree.table(name), name)
        x, y = _wanted(values, name, "X", "y")
        parts[split] = [
            _pixels(int(label) % 10, partial(lambda x, i: x[..., i], x, i)) for i, label in enumerate(y.ravel())
        ]
    return Official([str(i) for i in range(10)], parts["train"], test=parts["test"])


def _wanted(values: Mapping[str, Any], name: str, *keys: str) -> Iterator[Any]:
    for key in keys:
        if key not in values:
            raise DataError(f"{name} has no variable {key!r}; it has {', '.join(values) or 'none'}")
        yield values[key]


def listed(tree: Tree, train: Sequence[str], test: Sequence[str], val: Sequence[str] = (), below: str = "") -> Official:
    """Text files with a path a line, whose folder is the class: DTD, SUN397, Food-101.

    Args:
        below: the folder that the paths are relative to; not needed where they are enough to find a file.
    """
    parts = {split: [line for name in names for line in tree.lines(tree.one(name))]
             for split, names in (("train", train), ("val", val), ("test", test))}  # fmt: skip
    parts = {split: [line if "." in line[-5:] else f"{line}.jpg" for line in lines] for split, lines in parts.items()}

    def label(line: str) -> str:
        return line.strip("/").rpartition("/")[0]

    classes = sorted({label(line) for lines in parts.values() for line in lines})
    number = {name: i for i, name in enumerate(classes)}
    return Official(classes, **{
        split: [_at(tree, number[label(line)], f"{below}{line.lstrip('/')}") for line in lines]
        for split, lines in parts.items()
    })  # fmt: skip


def flowers(tree: Tree) -> Official:
    """Oxford Flowers 102: `setid.mat` has the splits, `imagelabels.mat` the labels from 1."""
    name = tree.one("setid.mat")
    ids = dict(zip(("train", "val", "test"), _wanted(mat(tree.table(name), name), name, "trnid", "valid", "tstid"),
                   strict=True))  # fmt: skip
    name = tree.one("imagelabels.mat")
    [labels] = _wanted(mat(tree.table(name), name), name, "labels")
    labels = labels.ravel()
    return Official([str(i + 1) for i in range(int(labels.max()))], **{
        split: [_at(tree, int(labels[i - 1]) - 1, f"image_{i:05d}.jpg") for i in map(int, numbers.ravel())]
        for split, numbers in ids.items()
    })  # fmt: skip


def pets(tree: Tree) -> Official:
    """Oxford-IIIT Pet: `trainval.txt` and `test.txt`, lines of a name and a label from 1."""
    names: dict[int, str] = {}
    parts: dict[str, list[Picture]] = {}
    for split, file in (("train", "annotations/trainval.txt"), ("test", "annotations/test.txt")):
        rows = [line.split() for line in tree.lines(tree.one(file)) if not line.startswith("#")]
        names |= {int(row[1]) - 1: row[0].rpartition("_")[0] for row in rows}
        parts[split] = [_at(tree, int(row[1]) - 1, f"{row[0]}.jpg") for row in rows]
    return Official([names[i] for i in range(len(names))], parts["train"], test=parts["test"])


def aircraft(tree: Tree) -> Official:
    """FGVC-Aircraft by variant: `images_variant_train.txt` and so on, lines of a number and a name."""
    classes = tree.lines(tree.one("variants.txt"))
    number = {name: i for i, name in enumerate(classes)}
    parts = {}
    for split in ("train", "val", "test"):
        rows = [line.split(maxsplit=1) for line in tree.lines(tree.one(f"images_variant_{split}.txt"))]
        parts[split] = [_at(tree, number[label], f"{name}.jpg") for name, label in rows]
    return Official(classes, **parts)


def birds(tree: Tree) -> Official:
    """CUB-200-2011 and NABirds: `images.txt`, `image_class_labels.txt`, `train_test_split.txt`, `classes.txt`."""

    def column(name: str) -> dict[str, str]:
        pairs = [line.split(maxsplit=1) for line in tree.lines(tree.one(name))]
        if any(len(pair) != 2 for pair in pairs):
            raise DataError(f"{name} in {shown(tree.source)} has a line that is not an id, a space and a value")
        return dict(pairs)

    paths, labels, train = map(column, ("images.txt", "image_class_labels.txt", "train_test_split.txt"))
    said = column("classes.txt")
    used = sorted(set(labels.values()), key=int)  # NABirds: the leaves of a tree of 1,011 names
    twice = Counter(said[i] for i in used)
    classes = [said[i] if twice[said[i]] == 1 else f"{said[i]} {i}" for i in used]
    number = {name: i for i, name in enumerate(used)}
    pictures = {i: _at(tree, number[labels[i]], f"images/{path}") for i, path in paths.items()}
    return Official(
        classes,
        [picture for i, picture in pictures.items() if train[i] == "1"],
        test=[picture for i, picture in pictures.items() if train[i] == "0"],
    )


def dogs(tree: Tree) -> Official:
    """Stanford Dogs: `train_list.mat`, `test_list.mat` with a cell of paths, whose folder is the class."""
    parts = {}
    for split in ("train", "test"):
        name = tree.one(f"{split}_list.mat")
        [parts[split]] = _wanted(mat(tree.table(name), name), name, "file_list")
    classes = sorted({path.partition("/")[0] for paths in parts.values() for path in paths})
    number = {name: i for i, name in enumerate(classes)}
    made = {
        split: [_at(tree, number[path.partition("/")[0]], path) for path in paths] for split, paths in parts.items()
    }
    return Official([name.partition("-")[2] or name for name in classes], made["train"], test=made["test"])


def cars(tree: Tree) -> Official:
    """Stanford Cars: `cars_annos.mat`, with the pictures in `car_ims`."""
    name = tree.one("cars_annos.mat")
    rows, names = _wanted(mat(tree.table(name), name), name, "annotations", "class_names")
    parts: dict[bool, list[Picture]] = {False: [], True: []}
    for row in rows:
        picture = _at(tree, int(row["class"].item()) - 1, row["relative_im_path"])
        parts[bool(row["test"].item())].append(picture)
    return Official(list(names), parts[False], test=parts[True])


def zhou(tree: Tree, file: str) -> Official:
    """A split of CoOp (Zhou et al. 2022): JSON with [path, label, class name] for train, val and test."""
    said = _json(tree, tree.one(file))
    names = {int(label): str(name) for part in said.values() for _, label, name in part}
    classes = [names[i] for i in range(len(names))]
    twice = Counter(classes)
    return Official(
        [name if twice[name] == 1 else f"{name} {i}" for i, name in enumerate(classes)],
        *([_at(tree, int(label), path) for path, label, _ in said[split]] for split in ("train", "val", "test")),
    )


def _json(tree: Tree, name: str) -> Any:
    try:
        return json.loads(tree.table(name))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} in {shown(tree.source)} is not JSON") from error


NORB_NAMES = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing",
}


def smallnorb(tree: Tree, attribute: str) -> Official:
    """smallNORB: the first camera; `info` has instance, elevation, azimuth (twice its number) and lighting."""
    column, step, count = {"elevation": (1, 1, 9), "azimuth": (2, 2, 18)}[attribute]
    parts = {}
    for split, stem in NORB_NAMES.items():
        (pictures, info) = (
            norb(tree.table(name), name)
            for name in (tree.one(f"{stem}-{kind}.mat", f"{stem}-{kind}.mat.gz") for kind in ("dat", "info"))
        )
        parts[split] = [
            _pixels(int(row[column]) // step, partial(lambda x, i: x[i, 0], pictures, i)) for i, row in enumerate(info)
        ]
    val, test = _part(parts["test"], len(parts["test"]) // 2)  # as VTAB has it
    return Official([str(i) for i in range(count)], parts["train"], val, test)


def dsprites(tree: Tree, attribute: str) -> Official:
    """dSprites: the x position (32 values) or the orientation (40), joined to 16 classes, as VTAB does."""
    column, values = {"location": (4, 32), "orientation": (3, 40)}[attribute]
    name = tree.one("dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz")
    try:
        with np.load(io.BytesIO(tree.table(name)), allow_pickle=False) as file:
            pictures, classes = file["imgs"], file["latents_classes"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{name} is not the .npz of dSprites: {error}") from error
    labels = (classes[:, column] * 16 // values).tolist()
    return Official([str(i) for i in range(16)], [
        _pixels(label, partial(lambda x, i: x[i] * np.uint8(255), pictures, i)) for i, label in enumerate(labels)
    ])  # fmt: skip


def clevr(tree: Tree, attribute: str) -> Official:
    """CLEVR: from the scenes, the number of objects (3 to 10), or the depth of the nearest one in VTAB's six bins.

    Test is the official val: the labels of the official test were never given away.
    """
    bins = np.array([8.0, 8.5, 9.0, 9.5, 10.0])
    classes = {
        "count": [str(i) for i in range(3, 11)],
        "distance": ["to 8", "to 8.5", "to 9", "to 9.5", "to 10", "above 10"],
    }[attribute]

    def label(objects: list[dict[str, Any]]) -> int:
        if attribute == "count":
            return len(objects) - 3
        return int(np.searchsorted(bins, min(np.float32(each["pixel_coords"][2]) for each in objects)))

    parts = {}
    for split, official in (("train", "train"), ("test", "val")):
        scenes = _json(tree, tree.one(f"CLEVR_{official}_scenes.json"))["scenes"]
        parts[split] = [
            _at(tree, label(scene["objects"]), f"images/{official}/{scene['image_filename']}") for scene in scenes
        ]
    return Official(classes, parts["train"], test=parts["test"])


def camelyon(tree: Tree) -> Official:
    """PatchCamelyon: HDF5 files with x [n, 96, 96, 3] and y; needs h5py."""
    try:
        import h5py
    except ImportError:
        raise DataError("PatchCamelyon is HDF5, which h5py reads: pip install h5py, or build from hf:NAME") from None
    parts = {}
    for split, official in (("train", "train"), ("val", "valid"), ("test", "test")):
        stem = f"camelyonpatch_level_2_split_{official}"
        try:
            x, y = (h5py.File(tree.path(tree.one(f"{stem}_{k}.h5")))[k] for k in "xy")
        except (OSError, KeyError) as error:
            raise DataError(f"{stem}_x.h5 or _y.h5 cannot be read: {error}") from error
        parts[split] = [
            _pixels(label, partial(x.__getitem__, i)) for i, label in enumerate(np.ravel(y[:]).astype(int).tolist())
        ]
    return Official(["no tumour", "tumour"], **parts)


def hub(name: str, label: str | None = None) -> Official:
    """A table of pictures and labels that `datasets` can load, from the hub or a folder; its code is never run.

    Raises:
        DataError: `datasets` is not installed, or there is no picture column or label column.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{HUB}{name} needs datasets: pip install datasets, or build from the owner's files") from None
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise DataError(f"datasets {datasets.__version__} can run code that it downloads: upgrade it to 4 or later")
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # it raises its own errors, those of the hub, of fsspec, of Arrow
        raise DataError(f"datasets cannot load {name!r}: {' '.join(str(error).split())[:200]}") from error
    features = next(iter(loaded.values())).features
    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if label in labels:
        labels = [label]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(f"{name} must have one picture column and one class column; it has {', '.join(features)}")
    parts: dict[str, list[Picture]] = {}
    for split, table in loaded.items():
        if split not in HUB_SPLITS:
            continue
        cells, numbers = table.data.column(images[0]), table.data.column(labels[0]).to_pylist()
        parts[HUB_SPLITS[split]] = [Picture(int(label), partial(_cell, cells, i)) for i, label in enumerate(numbers)]
    if "train" not in parts:
        raise DataError(f"{name} has no split named train; it has {', '.join(loaded)}")
    return Official(list(features[labels[0]].names), **parts)


def _cell(cells: Any, i: int) -> bytes:
    cell = cells[i].as_py()  # as it was stored, not decoded
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


READERS: dict[str, Reader] = {
    reader.__name__: reader
    for reader in (
        cifar,
        folders,
        svhn,
        listed,
        flowers,
        pets,
        aircraft,
        birds,
        dogs,
        cars,
        zhou,
        smallnorb,
        dsprites,
        clevr,
        camelyon,
    )
}  # fmt: skip
