"""A folder that belongs to one piece of work: whoever comes with another is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.errors import FileError, TrainingError
from ..core.sealed import reason, shown, write_json


def claim(path: Path, said: dict[str, Any], what: str) -> None:
    """Write down in `path` what its folder is for, or check that it says the same.

    Args:
        said: values that JSON can hold, with text keys.
        what: a word for the work, such as "search".

    Raises:
        TrainingError: the folder is for another; the line names the first key that differs, with both values.
        FileError: the file cannot be written or read.
    """
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as why:
            raise FileError(f"cannot make the folder {shown(path.parent)}: {reason(why)}") from None
        write_json(path, said)
        return
    try:
        was = _flat(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as why:
        raise FileError(f"cannot read {shown(path)}: {why}; choose another --out") from None
    now = _flat(said)
    for key in [*was, *now]:
        if was.get(key) != now.get(key):
            change = f"{key} was {was.get(key, 'unset')}, now it is {now.get(key, 'unset')}"
            raise TrainingError(
                f"{shown(path.parent)} holds another {what}: {change}; choose another --out, or put it back"
            )


def _flat(value: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{before}{key}.") if isinstance(inner, dict) else {f"{before}{key}": inner}
    return flat
