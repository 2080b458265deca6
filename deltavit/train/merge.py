"""A merged model as one plain file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safetensors.torch import save as to_bytes
from torch import nn

from ..core.attach import Adapter
from ..core.sealed import write_bytes
from ..models.tower import Tower


def merge_to_file(model: nn.Module, adapter: Adapter, path: str | Path) -> int:
    """Merge an adapter into its base and write the model's own state, under the names of its own library.

    Of a wrapped tower (transformers, open_clip) the new head is `head.weight` and `head.bias` beside them.  The file's
    metadata say which base, method, classes and preprocessing it has.  Returns its size in bytes.

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
    prefix = "body." if isinstance(model, Tower) else ""
    state = {n.removeprefix(prefix): t.detach().cpu().contiguous().clone() for n, t in model.state_dict().items()}
    return write_bytes(path, to_bytes(state, meta))
