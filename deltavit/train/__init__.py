"""Training: `fit` is a generator, `evaluate` and `predict` read pictures through the same decode path."""

from .evaluate import Evaluation, Prediction, evaluate, predict
from .fit import Step, Training, fit

__all__ = ["Evaluation", "Prediction", "Step", "Training", "evaluate", "fit", "predict"]
