"""Model families: one file each says where things are in it."""

from . import timm as _timm
from . import tiny as _tiny
from . import torchvision as _torchvision
from .load import load_model, skeleton

__all__ = ["load_model", "skeleton"]
_ = (_timm, _tiny, _torchvision)
