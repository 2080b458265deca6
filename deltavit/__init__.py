"""deltavit adapts large pretrained Vision Transformers to new image tasks by training a tiny part of them."""

__version__ = "0.3.0"

from . import methods as _methods
from .core.attach import Adapter, Plan, adapters, attach, plan
from .core.errors import DeltavitError
from .core.file import info, load
from .core.method import method, methods, register
from .core.site import Anatomy, Preprocessing, Site, Where, anatomy
from .data import Images, open_data, open_images
from .models import load_model
from .models.text import text_head
from .train import Evaluation, Step, Training, evaluate, fit, predict

__all__ = [
    "Adapter", "Anatomy", "DeltavitError", "Evaluation", "Images", "Plan", "Preprocessing", "Site", "Step", "Training",
    "Where", "adapters", "anatomy", "attach", "evaluate", "fit", "info", "load", "load_model", "method", "methods",
    "open_data", "open_images", "plan", "predict", "register", "text_head",
]  # fmt: skip
_ = _methods
