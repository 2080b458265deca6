"""From files to tensors: layouts, splits, one decode path, and an order that can be resumed anywhere."""

from .decode import decode
from .images import Images
from .layouts import open_data, open_images
from .sampler import batches, order
from .splits import Dataset, Split
from .transforms import augment, normalise, to_tensor

__all__ = [
    "Dataset",
    "Images",
    "Split",
    "augment",
    "batches",
    "decode",
    "normalise",
    "open_data",
    "open_images",
    "order",
    "to_tensor",
]
