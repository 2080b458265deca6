"""Published accuracies, with what must agree before one of ours may be compared with them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

MEANS = ("natural", "specialized", "structured", "mean_groups", "mean_sets")
"""Sets of a published row that are means over others."""

ALIASES = {
    "caltech": "caltech101", "cifar": "cifar100", "clevrcount": "clevr_count", "clevrcountall": "clevr_count",
    "clevrdist": "clevr_dist", "clevrclosestobjectdistance": "clevr_dist", "cub200": "cub", "cub2002011": "cub",
    "describabletextures": "dtd", "diabeticretinopathy": "retinopathy", "dspritesloc": "dsprites_loc",
    "dspriteslocation": "dsprites_loc", "dspritesori": "dsprites_ori", "dspritesorientation": "dsprites_ori",
    "dsprloc": "dsprites_loc", "dsprori": "dsprites_ori", "fgvcaircraft": "aircraft", "flowers": "flowers102",
    "food": "food101", "kittidist": "kitti", "kittidistance": "kitti", "oxfordflowers": "flowers102",
    "oxfordflowers102": "flowers102", "oxfordiiitpet": "pets", "oxfordiiitpets": "pets", "oxfordpets": "pets",
    "patchcamelyon": "camelyon", "pcam": "camelyon", "pet": "pets", "resisc": "resisc45", "retino": "retinopathy",
    "smallnorbazi": "smallnorb_azi", "smallnorbazimuth": "smallnorb_azi", "smallnorbele": "smallnorb_ele",
    "smallnorbelevation": "smallnorb_ele", "snorbazi": "smallnorb_azi", "snorbele": "smallnorb_ele",
    "stanfordcars": "cars", "stanforddogs": "dogs", "sun": "sun397", "svhncropped": "svhn",
}  # fmt: skip
"""Other names of data sets, as lists in wide use write them, without case and punctuation."""


@dataclass(frozen=True)
class Published:
    """One accuracy from a paper."""

    table: str
    label: str
    method: str | None
    """Name in deltavit, where there is such a method; `+pace` is training with PACE."""
    set: str
    """A data set, or one of MEANS."""
    accuracy: float
    shots: int | None
    protocol: str
    backbone: str
    checkpoint: str
    """timm name, or "" where the paper names none."""
    image_size: int
    epochs: int | None
    pixels: str | None
    source: str
    paper: str
    leak: bool | None
    """The best epoch was chosen on the test pictures; None: not known."""
    unverified: bool
    note: str
    over: tuple[str, ...]
    """The data sets of its table: what a mean is over."""

    def differs(self, protocol: str, checkpoint: str, size: int, epochs: int, pixels: str) -> list[str]:
        """Why an accuracy of ours cannot be compared with this one: each setting that is another, or not known."""
        found = []
        if plain(protocol) != plain(self.protocol):
            found.append(f"protocol {self.protocol}, ours {protocol}")
        if not self.checkpoint or checkpoint != self.checkpoint:
            found.append(f"{self.backbone} {self.checkpoint or '(checkpoint not named)'}, ours {checkpoint}")
        for ours, theirs, unit in (
            (size, self.image_size, " px"),
            (epochs, self.epochs, " epochs"),
            (pixels, self.pixels, " pixels"),
        ):
            if theirs is None:
                found.append(f"{unit.strip()} not known")
            elif ours != theirs:
                found.append(f"{theirs}{unit}, ours {ours}")
        if self.leak is not False:
            found.append("best epoch on test" if self.leak else "choice of the epoch not known")
        if self.unverified:
            found.append("not verified")
        return found


def find(method: str | None, set: str, model: str = "", shots: int | None = None) -> list[Published]:
    """What was published for a method on a data set, the rows of this checkpoint first.

    Args:
        method: its name in deltavit; None for every method.
        set: a data set under any of its usual names, or one of MEANS.
        model: timm name of a checkpoint.
        shots: of a few-shot protocol.
    """
    wanted = known_as(set)
    rows = [row for row in published() if row.set == wanted and row.shots == shots and method in (None, row.method)]
    return sorted(rows, key=lambda row: row.checkpoint != model)


def known_as(name: str) -> str:
    """The name of a data set in these tables, whatever list it comes from."""
    return ALIASES.get(plain(name), name if name in MEANS else _by_plain().get(plain(name), name))


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def published() -> tuple[Published, ...]:
    """Every number, in the order of the file."""
    return tuple(_read())


def _read() -> Iterator[Published]:
    data = contents()
    for table in data["tables"]:
        for row in table["rows"]:
            told = {**table, **row}
            source = data["sources"][told["source"]]
            shared = {
                "table": table["name"], "label": row["label"], "method": row.get("method"),
                "protocol": table["protocol"], "backbone": told["backbone"], "checkpoint": told.get("checkpoint", ""),
                "image_size": table["image_size"], "epochs": source.get("epochs"), "pixels": source.get("pixels"),
                "source": told["source"], "paper": _paper(source["paper"], row.get("quoted")),
                "unverified": row.get("unverified", False), "note": told.get("note", ""),
                "over": tuple(table.get("sets", ())),
            }  # fmt: skip
            leak = source.get("leak")
            for set, shots, percent, chosen in _numbers(table, row, leak):
                yield Published(set=set, shots=shots, accuracy=round(percent / 100, 6), leak=chosen, **shared)


def _numbers(
    table: Mapping[str, Any], row: Mapping[str, Any], leak: bool | None
) -> Iterator[tuple[str, int | None, float, bool | None]]:
    """Data set, shots, percent and leak mark of each number in a row."""
    shots = table.get("shots", [None])
    for set, percent in zip(table["sets"], row["scores"], strict=True) if "scores" in row else ():
        yield set, shots[0], percent, leak
    for name, percent in row.get("means", {}).items():
        yield name, shots[0], percent, leak
    for count, percent in zip(shots, row["by_shots"], strict=True) if "by_shots" in row else ():
        yield "mean_sets", count, percent, leak
    if "best_epoch" in row:
        yield "mean_groups", shots[0], row["best_epoch"], True


def _paper(paper: str, quoted: str | None) -> str:
    return paper if quoted is None else f"{paper}, as quoted by {quoted}"


@cache
def contents() -> dict[str, Any]:
    """The file as it is."""
    return tomllib.loads(files(__package__).joinpath("published.toml").read_text("utf-8"))


@cache
def _by_plain() -> dict[str, str]:
    return {plain(name): name for table in contents()["tables"] for name in table.get("sets", ())}
