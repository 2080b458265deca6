"""Adapters and checkpoints on the disk: sealed, whole or absent, and safe to open whoever wrote them."""

from ..core.sealed import Header, layout, pack, packed_shapes, read, read_header, unpack, write
from .checkpoints import Checkpoints
from .claim import claim
from .lock import FolderLock
from .names import inside, safe_name

__all__ = [
    "Checkpoints",
    "FolderLock",
    "Header",
    "claim",
    "inside",
    "layout",
    "pack",
    "packed_shapes",
    "read",
    "read_header",
    "safe_name",
    "unpack",
    "write",
]
