"""What was opened: `Split`, `Dataset`, and how one set of pictures is cut into several."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..core.errors import DataError
from .decode import RULES, shown

HASHED_FILES = 20_000


@dataclass(frozen=True)
class Split:
    """Pictures and their labels.  `root` is what the names in the digest are relative to."""

    name: str
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    root: Path = Path()

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Paths relative to the root, with forward slashes."""
        return tuple(Path(os.path.relpath(path, self.root)).as_posix() for path in self.paths)

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """One fingerprint a file, equal for equal bytes.  Above 20,000 files: of the name and the size only.

        Raises:
            DataError: a file that cannot be read.
        """
        if len(self) > HASHED_FILES:
            return tuple(_size_hash(name, path) for name, path in zip(self.names, self.paths, strict=True))
        return tuple(_content_hash(path) for path in self.paths)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over relative paths, labels and `contents`, in order; it does not change when the folder moves."""
        digest = hashlib.sha256()
        for name, label, content in zip(self.names, self.labels, self.contents, strict=True):
            digest.update(os.fsencode(f"{name}\0{label}\0{content}\n"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Train, val and perhaps test pictures of the same classes.  `notes` are warnings that a person should see."""

    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None
    notes: list[str]
    kind: str
    seed: int

    @property
    def whole(self) -> Split:
        """The pictures of train and val together, for a last training once all is chosen on val."""
        train, val = self.train, self.val
        seen = set(train.paths)
        extra = [(p, c) for p, c in zip(val.paths, val.labels, strict=True) if p not in seen]
        paths, labels = train.paths + tuple(p for p, _ in extra), train.labels + tuple(c for _, c in extra)
        return Split("train+val", paths, labels, train.root)

    def manifest(self) -> dict[str, object]:
        """What was opened, for the record of a run: JSON-able, and equal only for equal data."""
        return {
            "kind": self.kind,
            "seed": self.seed,
            "classes": len(self.classes),
            **{split: _record(getattr(self, split)) for split in ("train", "val", "test")},
            "decode": RULES,
            "notes": self.notes,
        }


def cut(labels: Sequence[int], contents: Sequence[str], shares: Sequence[float], seed: int) -> list[list[int]]:
    """Positions of each part: first what is left (train), then one part for each share (val, test).

    Every class is spread over the parts in proportion, less than two pictures off; equal contents stay together; every
    class keeps at least one picture in train.  A part has `share * n` pictures, rounded, and at least one; groups of
    equal pictures can shift that by their size.

    Raises:
        DataError: too few pictures for that.
    """
    groups = defaultdict(list)
    for i, content in enumerate(contents):
        groups[content].append(i)
    by_class: dict[int, list[str]] = defaultdict(list)
    for content, members in groups.items():
        by_class[labels[members[0]]].append(content)

    places = {}
    for label, own in by_class.items():
        shift = _fraction(f"{seed} {label}")
        for rank, content in enumerate(sorted(own, key=lambda content: _fraction(f"{seed} {content}"))):
            places[content] = (rank + shift) / len(own) if rank else -1.0

    sizes = [max(1, round(share * len(labels))) for share in shares]
    ends = [len(labels) - sum(sizes[k:]) for k in range(len(sizes))] + [len(labels)]
    parts: list[list[int]] = [[] for _ in ends]
    before = 0
    for content in sorted(places, key=lambda content: (places[content], content)):
        part = next(k for k, end in enumerate(ends) if before < end)
        parts[part] += groups[content]
        before += len(groups[content])
    if not all(parts) or {labels[i] for i in parts[0]} != set(labels):
        raise DataError(
            f"{len(labels)} pictures in {len(set(labels))} classes are too few to cut {' and '.join(map(str, shares))} "
            "of them away and keep every class in train; add pictures, ask for less, or give the splits yourself"
        )
    return [sorted(part) for part in parts]


def few(split: Split, shots: int, seed: int, *, exactly: bool = True) -> Split:
    """The same number of pictures of every class, chosen by a hash of (seed, name): adding classes moves no other.

    Raises:
        DataError: a class has fewer; with `exactly=False`, all it has are taken.
    """
    by_class: dict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(split.labels):
        by_class[label].append(i)
    chosen: list[int] = []
    for label, own in by_class.items():
        if len(own) < shots and exactly:
            raise DataError(
                f"class number {label} has {len(own)} pictures in {split.name}, fewer than shots={shots}: ask for fewer"
            )
        chosen += sorted(own, key=lambda i: _fraction(f"{seed} {split.names[i]}"))[:shots]
    chosen.sort()
    return Split(split.name, tuple(split.paths[i] for i in chosen), tuple(split.labels[i] for i in chosen), split.root)


def _fraction(text: str) -> float:
    """A number in [0, 1) that looks random and never changes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _content_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror}") from error


def _size_hash(name: str, path: Path) -> str:
    try:
        return hashlib.sha256(os.fsencode(f"{name}\0{path.stat().st_size}")).hexdigest()
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror}") from error


def _record(split: Split | None) -> dict[str, object] | None:
    return None if split is None else {"size": len(split), "digest": split.digest}
