"""Our exceptions.

DeltavitError              everything deltavit refuses, one line that says what, with the value, and the way out
├── ModelError             not a Vision Transformer we know, or weights that do not fit
├── MethodError            no such method, an option that is wrong, or a method that this model cannot take
├── DataError              a folder, list or picture that cannot be read as asked
├── AdapterError           an adapter in the wrong state for what was asked (merged, detached)
├── FileError              an adapter or checkpoint file that is torn, hostile, or of another base
├── RecipeError            a recipe with an unknown key or an impossible value
└── TrainingError          a run that cannot go on: a folder that another process owns, another run's checkpoint
    └── Diverged           a loss, gradient or tensor that is not finite: lower the learning rate
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeltavitError(Exception):
    """Root of everything deltavit raises on purpose; the command line prints it as one line."""


class ModelError(DeltavitError): ...


class MethodError(DeltavitError): ...


class DataError(DeltavitError): ...


class AdapterError(DeltavitError): ...


class FileError(DeltavitError): ...


class RecipeError(DeltavitError): ...


class TrainingError(DeltavitError): ...


class Diverged(TrainingError): ...


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for a name nobody knows: the nearest known one first, then all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no {kind} named {name!r}{hint}  known: {', '.join(known)}"
