"""A merged model as one plain file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safetensors.torch import save as to_bytes
from torch import nn

from ..core.attach import Adapter
from ..core.sealed import write_bytes


def merge_to_file(model: nn.Module, adapter: Adapter, path: str | Path) -> int:
    """Merge an adapter into its base and write the model's own state, under the names of its own library.

    The file's metadata say which base, method, classes and preprocessing it has.  Returns its size in bytes.

    Raises:
        MethodError: the method does not merge.  FileError: the disk refuses.
    """
    vit = adapter.vit
    adapter.merge()
    meta = {
        "base": json.dumps({"name": vit.name, "options": vit.options, "fingerprint": vit.fingerprint}),
        "method": json.dumps({"name": adapter.method.name, "options": adapter.method.options()}),
        "classes": json.dumps(adapter.classes),
        "preprocessing": json.dumps(dataclasses.asdict(adapter.preprocessing)),
    }
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    return write_bytes(path, to_bytes(state, meta))
