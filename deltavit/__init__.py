"""deltavit adapts large pretrained Vision Transformers to new image tasks by training a tiny part of them."""

__version__ = "0.1.0"
