"""Weights on disk and on the hub: safetensors alone, and one line about what does not work."""

from __future__ import annotations

import logging
from pathlib import Path

import safetensors
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.errors import ModelError


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a local .safetensors file, in float32.

    Raises:
        ModelError: no such file, or not a safetensors file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelError(f"no weights at {path}: give a .safetensors file")
    try:
        state = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        why = "deltavit never opens pickles" if _is_pickle(path) else first_line(error)
        raise ModelError(f"{path.name} is not a safetensors file ({why}): convert the weights to one") from None
    return {k: v.float() for k, v in state.items()}


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x04")


def fetch(name: str, repo: str, filename: str) -> Path:
    """A file of a hub repository, from the cache where it is there.

    Raises:
        ModelError: the hub is out of reach, or the repository holds no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        return Path(hf_hub_download(repo, filename))
    except Exception as error:  # the hub's client raises a dozen kinds, all but one of which mean the same here
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ModelError(f"{repo} holds no safetensors file, and deltavit never opens pickles") from None
        raise unreachable(f"the weights of {name}", error) from None


def unreachable(what: str, error: Exception) -> ModelError:
    why = f"{type(error).__name__}: {first_line(error)[:120]}"
    return ModelError(f"{what} could not be fetched ({why}); give a local file: weights=FILE.safetensors")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def fill(model: nn.Module, state: dict[str, Tensor], name: str, source: str, head: tuple[str, ...] = ()) -> None:
    """Load every tensor of a model; what begins with one of `head` may be missing or extra.

    Raises:
        ModelError: tensors that are missing, extra or of another shape.
    """
    try:
        wanted = model.state_dict()
        fitting = {k: v for k, v in state.items() if k not in wanted or v.shape == wanted[k].shape}
        missing, extra = model.load_state_dict(fitting, strict=False)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(f"{source} does not fit {name}: {first_line(error)}") from None
    misshapen = sorted(set(state) - set(fitting))
    kept = [[k for k in keys if not k.startswith(head)] for keys in (missing, extra)]
    for what, keys in zip(("other shapes", "missing", "not in the model"), (misshapen, *kept), strict=True):
        if keys:
            raise ModelError(f"{source} does not fit {name}: {len(keys)} tensors {what}, {', '.join(keys[:3])}")
