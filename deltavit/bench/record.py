"""What a cell leaves behind: one JSON file, whole or not there, from which every table is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from ..core.sealed import reason, shown, write_bytes

FORMAT = 1
SUFFIX = ".json"
LIMIT = 16 * 2**20
"""Bytes that a record may have; one of 1,000 classes and 1,000 epochs has a tenth of a megabyte."""
NEEDED = ("key", "status", "model", "method", "set", "seed", "recipe")
DONE = ("test_accuracy", "body", "head", "seconds", "clean", "base", "preprocessing", "data")


def write_record(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write `folder`/KEY.json; returns the record as reading it will give it.

    Raises:
        FileError: the disk refuses; what was there before is still there.
    """
    text = json.dumps(record, indent=1, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / (record["key"] + SUFFIX), (text + "\n").encode())
    return json.loads(text)  # type: ignore[no-any-return]


def read_records(folder: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All records of a suite in order of their keys, and one line for each file that is none.

    Args:
        folder: of the suite's results, or its `records` folder itself.

    Raises:
        DataError: no such folder, or no record in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{shown(folder)} is not a folder: give the one that `deltavit bench` wrote, its --out")
    folder = folder / "records" if (folder / "records").is_dir() else folder
    records, problems = [], []
    for path in sorted(folder.glob("*" + SUFFIX)):
        try:
            records.append(read_record(path))
        except DataError as why:
            problems.append(str(why))
    if not records and not problems:
        raise DataError(f"{shown(folder)} holds no record: run `deltavit bench` first")
    return records, problems


def read_record(path: Path) -> dict[str, Any]:
    """One record.

    Raises:
        DataError: torn, of a newer format, or not a record; the line names the file.
    """
    name = shown(path)
    again = "delete it and run the suite again"
    try:
        if path.stat().st_size > LIMIT:
            raise DataError(f"{name} has more than {LIMIT:,} bytes: it is not a record")
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as why:
        raise DataError(f"cannot read {name}: {reason(why)}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{name} is torn, or not JSON: {again}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise DataError(f"{name} has format {found!r}, this deltavit reads {FORMAT}: {again}, or upgrade deltavit")
    needed = NEEDED + (DONE if record.get("status") == "done" else ())
    if missing := [key for key in needed if key not in record]:
        raise DataError(f"{name} lacks {', '.join(missing)}: {again}")
    if record["key"] != path.name.removesuffix(SUFFIX):
        raise DataError(f"{name} says that its key is {record['key']!r}: it was renamed; name it after its key")
    return record
