"""The layouts in which people keep pictures: folders of classes, VTAB-1k lists, a CSV."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..core.errors import DataError, unknown
from .decode import shown
from .splits import HASHED_FILES, Dataset, Split, cut, few

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LISTS = {
    "train": ("train800.txt", "train.txt", "train800val200.txt"),
    "val": ("val200.txt", "val.txt"),
    "test": ("test.txt",),
}
CLASS_LISTS = ("classes.txt", "labels.txt")
VAL_SHOTS = 4
"""Most validation pictures a class beside few-shot training ones, as in CoOp (Zhou et al. 2022, arXiv:2109.01134)."""


@dataclass
class Found:
    """What a layout says: (file, class) pairs by split, `all` where nothing is split yet."""

    kind: str
    root: Path
    parts: dict[str, list[tuple[Path, str]]] = field(default_factory=dict)
    classes: list[str] | None = None
    skipped: Counter[str] = field(default_factory=Counter)


def open_data(
    path: str | Path, *, seed: int = 0, val: float = 0.1, test: float = 0.1, train_list: str | None = None,
    shots: int | None = None, shots_seed: int = 0,
) -> Dataset:  # fmt: skip
    """Pictures with labels, from any of four layouts.

    - a folder with `train/CLASS/picture`, and perhaps `val` (or `valid`, `validation`) and `test` beside it;
    - a folder with `CLASS/picture`;
    - a folder with VTAB-1k lists, `train800.txt`, `val200.txt`, `test.txt`: a relative path and an integer a line.
      `classes.txt`, one name a line, may name the integers.  `train_list="train800val200.txt"` trains on both parts;
    - a CSV with the columns `path` (relative to the CSV), `label` and perhaps `split`.

    Class names are in plain string order (`10` before `2`), except for lists, where the integers are the order.

    Args:
        seed: of the cut, where the layout leaves one to us.
        val: share of the pictures cut away for val, where there is none.  Stratified; equal files stay together.
        test: the same for test, where nothing is split at all; 0 for none.
        train_list: which list to train on.
        shots: pictures of each class to train on, chosen by `shots_seed`; val then has min(shots, 4) a class.

    Raises:
        DataError: nothing there, one class only, an empty class, a class that train does not have, a label out of
            range, a path that leaves the folder, a file listed twice.
    """
    if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
        raise DataError(f"shares val={val} and test={test} leave nothing to train on; both are fractions, val above 0")
    found = _look(Path(path), train_list)
    _check(found, train_list)
    classes = found.classes or sorted({name for items in found.parts.values() for _, name in items})
    number = {name: i for i, name in enumerate(classes)}
    splits = {
        name: Split(name, tuple(path for path, _ in items), tuple(number[label] for _, label in items), found.root)
        for name, items in found.parts.items()
    }
    if "all" in splits:
        splits = _cut(splits["all"], {"val": val, "test": test} if test else {"val": val}, seed)
    elif "val" not in splits:
        splits |= _cut(splits["train"], {"val": val}, seed)
    if shots is not None:
        if shots < 1:
            raise DataError(f"shots={shots}: there must be at least one picture a class")
        splits["train"] = few(splits["train"], shots, shots_seed)
        splits["val"] = few(splits["val"], min(shots, VAL_SHOTS), shots_seed, exactly=False)
    notes = [
        *_skipped(found.skipped),
        *_untrained(classes, splits["train"]),
        *_overlaps([splits[name] for name in LISTS if name in splits]),
    ]
    return Dataset(tuple(classes), splits["train"], splits["val"], splits.get("test"), notes, found.kind, seed)


def open_images(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Pictures to predict: files as they are given, folders searched to the bottom in sorted order.

    Raises:
        DataError: a path that does not exist, or no picture at all.
    """
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    found: list[Path] = []
    for path in given:
        if not path.exists():
            raise DataError(f"{shown(path)} does not exist")
        found += _pictures(path, Counter()) if path.is_dir() else [path]
    if not found:
        raise DataError(
            f"no pictures in {', '.join(map(shown, given)) or 'an empty list'}; known: {' '.join(SUFFIXES)}"
        )
    return found


def _look(path: Path, train_list: str | None) -> Found:
    if path.is_file() and path.suffix.lower() == ".csv" and not train_list:
        return _csv(path)
    if not path.is_dir():
        raise DataError(f"{shown(path)} is neither a folder nor a CSV file with the columns path,label")
    if train_list or (not (path / "train").is_dir() and any((path / name).is_file() for name in LISTS["train"])):
        return _lists(path, train_list)
    return _folders(path) if (path / "train").is_dir() else _classes(path)


def _folders(root: Path) -> Found:
    found = Found("folders", root)
    for folder in (root / name for name in SPLIT_NAMES if (root / name).is_dir()):
        split = SPLIT_NAMES[folder.name]
        if split in found.parts:
            raise DataError(f"{shown(folder)} is a second folder for {split}; keep one of them")
        found.parts[split] = _class_folders(folder, found.skipped)
    return found


def _classes(root: Path) -> Found:
    found = Found("classes", root)
    found.parts["all"] = _class_folders(root, found.skipped)
    return found


def _class_folders(root: Path, skipped: Counter[str]) -> list[tuple[Path, str]]:
    items = []
    for entry in sorted(root.iterdir(), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            skipped["hidden"] += 1
        elif not entry.is_dir():
            skipped["outside any class folder"] += 1
        elif pictures := _pictures(entry, skipped):
            items += [(picture, entry.name) for picture in pictures]
        else:
            raise DataError(f"class {entry.name!r} has no picture in {shown(entry)}; add some or remove the folder")
    if not items:
        raise DataError(
            f"no class folders with pictures in {shown(root)}; put each picture in a folder named by its class"
        )
    return items


def _pictures(folder: Path, skipped: Counter[str]) -> list[Path]:
    found = []
    for where, folders, files in os.walk(folder):
        skipped["hidden"] += sum(name.startswith(".") for name in folders)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(where, name) for name in files):
            if path.name.startswith("."):
                skipped["hidden"] += 1
            elif path.suffix.lower() not in SUFFIXES:
                skipped["without a picture suffix"] += 1
            elif not path.is_file():
                skipped["not a regular file"] += 1
            else:
                found.append(path)
    return sorted(found, key=lambda path: path.as_posix())


def _lists(root: Path, train_list: str | None) -> Found:
    names = {split: next((n for n in known if (root / n).is_file()), None) for split, known in LISTS.items()}
    names["train"] = train_list or names["train"]
    found = Found("lists", root)
    count = 0
    for split, name in names.items():
        if name is None:
            continue
        found.parts[split] = []
        for line, text in enumerate(_text(root / name).split("\n"), 1):
            if not text.strip():
                continue
            at = f"{shown(root / name)} line {line}"
            relative, label = ("", *text.strip().rsplit(maxsplit=1))[-2:]
            if not relative or not re.fullmatch("[0-9]{1,9}", label):
                raise DataError(f"{at}: {text.strip()[:80]!r} is not a relative path, a space and a label from 0 up")
            found.parts[split].append((_inside(root, relative, at), str(int(label))))
            count = max(count, int(label) + 1)
    found.classes = _named(found, root, count)
    return found


def _named(found: Found, root: Path, count: int) -> list[str]:
    """The names of the integers, which then replace them; without a file of names, they name themselves."""
    file = next((root / name for name in CLASS_LISTS if (root / name).is_file()), None)
    if file is None:
        used = {int(label) for items in found.parts.values() for _, label in items}
        gap = next((i for i in range(count) if i not in used), None)
        if gap is not None:
            raise DataError(f"labels go up to {count - 1}, but class {gap} has no picture; number them without gaps")
        return [str(i) for i in range(count)]
    names = [line.strip() for line in _text(file).split("\n") if line.strip()]
    if len(set(names)) < len(names):
        raise DataError(f"{shown(file)} has {Counter(names).most_common(1)[0][0]!r} twice; class names must differ")
    if count > len(names):
        raise DataError(
            f"label {count - 1} is out of range: {shown(file)} names {len(names)} classes, 0 to {len(names) - 1}"
        )
    found.parts = {split: [(path, names[int(i)]) for path, i in items] for split, items in found.parts.items()}
    return names


def _csv(file: Path) -> Found:
    found = Found("csv", file.parent)
    try:
        rows = csv.DictReader(io.StringIO(_text(file)))
        columns = rows.fieldnames or []
        for wanted in ("path", "label"):
            if wanted not in columns:
                raise DataError(
                    f"{shown(file)} has no column {wanted!r}; its first line must be path,label or path,label,split"
                )
        for row in rows:
            at = f"{shown(file)} line {rows.line_num}"
            relative, label, split = (row.get(name) or "" for name in ("path", "label", "split"))
            if not relative or not label:
                raise DataError(f"{at}: path {relative!r} and label {label!r} must both be there")
            if "split" in columns and split not in SPLIT_NAMES:
                raise DataError(f"{at}: {unknown('split', split, SPLIT_NAMES)}")
            part = SPLIT_NAMES[split] if "split" in columns else "all"
            found.parts.setdefault(part, []).append((_inside(file.parent, relative, at), label))
    except csv.Error as error:
        raise DataError(f"{shown(file)} is not a CSV file: {error}") from error
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"{shown(file)} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(file)} is not UTF-8 text (byte {error.start})") from error


def _inside(root: Path, relative: str, at: str) -> Path:
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(relative).anchor or ".." in kind(relative).parts or "\0" in relative:
            raise DataError(f"{at}: {relative[:80]!r} leaves {shown(root)}; paths must be relative and stay below it")
    path = root / relative
    if not os.path.isfile(path):
        raise DataError(f"{at}: there is no file {shown(path)}")
    return path


def _check(found: Found, train_list: str | None) -> None:
    train = found.parts.get("train") or found.parts.get("all")
    if not train:
        raise DataError(f"no pictures to train on in {shown(found.root)}")
    trained = {name for _, name in train}
    # lists are made by drawing pictures, 800 from 397 classes say: some classes may then be in test alone
    known = {n for items in found.parts.values() for _, n in items} if found.kind == "lists" else trained
    for name in found.classes or ():
        if name not in known:
            raise DataError(f"class {name!r} has no picture in train; add some or remove its name")
    if len(trained) < 2:
        raise DataError(f"{shown(found.root)} has one class only, {trained.pop()!r}; a classifier needs two or more")
    seen: dict[str, str] = {}
    for split, items in found.parts.items():
        for path, name in items:
            if name not in known:
                raise DataError(
                    f"class {name!r} is in {split} ({shown(path)}) but not in train; add it there or remove it"
                )
            file = os.path.realpath(path)
            if file in seen and not (train_list and (seen[file], split) == ("train", "val")):
                raise DataError(f"{shown(path)} is in {seen[file]} and again in {split}; keep one of them")
            seen[file] = split


def _cut(whole: Split, shares: dict[str, float], seed: int) -> dict[str, Split]:
    parts = cut(whole.labels, whole.contents, list(shares.values()), seed)
    return {
        name: Split(name, tuple(whole.paths[i] for i in part), tuple(whole.labels[i] for i in part), whole.root)
        for name, part in zip(("train", *shares), parts, strict=True)
    }


def _skipped(skipped: Counter[str]) -> Iterator[str]:
    for reason, count in sorted(skipped.items()):
        if count:
            yield f"skipped {count} {reason}"


def _untrained(classes: Sequence[str], train: Split) -> Iterator[str]:
    trained = set(train.labels)
    missing = [name for i, name in enumerate(classes) if i not in trained]
    if missing:
        first = ", ".join(map(repr, missing[:3]))
        yield f"{len(missing)} of {len(classes)} classes have no picture in train ({first}): they cannot be learned"


def _overlaps(splits: Sequence[Split]) -> Iterator[str]:
    """Exact duplicates between splits that were given; those that we cut have none."""
    if any(len(split) > HASHED_FILES for split in splits):
        yield f"more than {HASHED_FILES:,} files: digests are of names and sizes, exact duplicates were not looked for"
        return
    for i, earlier in enumerate(splits):
        known = set(earlier.contents)
        for later in splits[i + 1 :]:
            if shared := sum(content in known for content in later.contents):
                yield f"overlap: {shared} of {len(later)} pictures of {later.name} are byte for byte in {earlier.name}"
