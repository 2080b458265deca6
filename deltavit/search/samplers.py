"""Which values come next, and whether a trial goes on: functions of the points so far, so that a search which was
killed proposes what it would have proposed.

Points are in the order in which they were first tried.  A failed one counts as accuracy 0, as in the ELEVATER toolkit.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..core.errors import TrainingError
from .space import Plan, Range, Value, Values, name_of

COARSE = 7
SPANS = (8, 4, 2, 1)
RUNGS = 3
"""Successive halving looks after 1, 3, 9, 27, .. epochs, and the best third goes on."""
TRIES = 100
"""Proposals of values already tried, one after the other, until a sampler is taken to have no new ones."""


@dataclass(frozen=True)
class Point:
    """What is known of some values: all that was ever tried with them is one point."""

    values: Values
    state: Literal["complete", "pruned", "failed", "running", "dead"]
    """`dead`: whoever tried them was killed or stopped, so they are tried again."""
    accuracy: float | None = None
    curve: Mapping[int, float] | None = None
    """Epoch, from 1 -> accuracy on val."""
    epochs: int = 0
    seconds: float = 0.0
    error: str | None = None
    stuck: int = 0
    """Tries that died one after the other from the same checkpoint."""

    @property
    def name(self) -> str:
        return name_of(self.values)


def propose(
    plan: Plan, sampler: str, trials: int, seed: int, points: Sequence[Point], whole: Container[str]
) -> Values | None:
    """The next values to try, None where there are none, or none before a running trial has ended.

    Args:
        whole: keys of which a range has only whole numbers.
    """
    if sampler == "grid":
        tried = {point.name for point in points}
        return next((values for values in grid(plan) if name_of(values) not in tried), None)
    if sampler == "elevater":
        return elevater(plan, points)
    if len(points) >= trials:
        return None
    return _optuna(plan, sampler, seed, points, distributions(plan, whole))


def grid(plan: Plan) -> list[Values]:
    """All combinations, those of the last key beside each other."""
    return [dict(zip(plan, values, strict=True)) for values in itertools.product(*plan.values())]  # type: ignore[arg-type]


def elevater(plan: Plan, points: Sequence[Point]) -> Values | None:
    """The automatic search of the ELEVATER toolkit, as PEViT uses it (`hyperparameter_sweep_lr` in both).

    For each learning rate: 7 weight decays far apart, then 8, 4, 2 and 1 places left and right of the best so far.
    Any further key multiplies the learning rates.  Where none of the 7 is above zero the toolkit climbs from a place
    it never tried; we go to the next learning rate.
    """
    known = {point.name: point for point in points}
    decays: Sequence[Value] = plan["train.weight_decay"]  # type: ignore[assignment]
    for others in grid({key: told for key, told in plan.items() if key != "train.weight_decay"}):
        values = [{key: {**others, "train.weight_decay": decay}[key] for key in plan} for decay in decays]
        met = {i: known[name_of(v)] for i, v in enumerate(values) if name_of(v) in known}
        scores = {i: point.accuracy or 0.0 for i, point in met.items() if point.state != "running"}
        for i in wanted(scores, len(decays)):
            if i not in met:
                return values[i]
    return None


def wanted(scores: Mapping[int, float], size: int) -> list[int]:
    """Places of a list of `size` that the climb needs next, given the scores so far; none at its end."""
    coarse = [i * (size - 1) // (COARSE - 1) for i in range(COARSE)]
    if missing := [i for i in coarse if i not in scores]:
        return missing
    peak = max(coarse, key=lambda i: (scores[i], -i))
    if scores[peak] <= 0:
        return []
    for span in SPANS:
        sides = [i for i in (max(peak - span, 0), min(peak + span, size - 1)) if i != peak]
        if missing := [i for i in sides if i not in scores]:
            return missing
        for i in sides:
            if scores[i] > scores[peak]:
                peak = i
    return []


def halved(curve: Mapping[int, float], others: Sequence[Mapping[int, float]], epochs: int) -> bool:
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934): whether a trial should stop now.

    At each rung it must be among the best third of those that reached it, or the best while there are fewer than three.
    """
    rung = 1
    while rung < epochs:
        if rung in curve:
            rivals = sorted([other[rung] for other in others if rung in other] + [curve[rung]], reverse=True)
            if curve[rung] < rivals[max(len(rivals) // RUNGS - 1, 0)]:
                return True
        rung *= RUNGS
    return False


# --- Optuna ----------------------------------------------------------------------------------------------------------


def optuna() -> Any:
    """The package, quiet, or the line that says how to get it."""
    try:
        import optuna as found
    except ImportError:
        raise TrainingError("a search needs Optuna: pip install 'deltavit[search]'") from None
    found.logging.set_verbosity(found.logging.WARNING)
    return found


def distributions(plan: Plan, whole: Container[str]) -> dict[str, Any]:
    """The space in Optuna's words."""
    kinds = optuna().distributions
    made: dict[str, Any] = {}
    for key, told in plan.items():
        if not isinstance(told, Range):
            made[key] = kinds.CategoricalDistribution(told)
        elif key in whole:
            made[key] = kinds.IntDistribution(int(told.low), int(told.high), log=told.log, step=int(told.step or 1))
        else:
            made[key] = kinds.FloatDistribution(told.low, told.high, log=told.log, step=told.step)
    return made


def _optuna(plan: Plan, sampler: str, seed: int, points: Sequence[Point], space: Mapping[str, Any]) -> Values | None:
    """One proposal of a study in memory that is told all points; those already tried are answered from them."""
    package = optuna()
    drawn = int.from_bytes(hashlib.blake2b(repr((seed, len(points))).encode(), digest_size=4).digest(), "little")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", package.exceptions.ExperimentalWarning)
        kinds = package.samplers
        made = kinds.RandomSampler(drawn) if sampler == "random" else kinds.TPESampler(seed=drawn, constant_liar=True)
        study = package.create_study(direction="maximize", sampler=made)
    states = package.trial.TrialState
    for point in points:
        study.add_trial(package.trial.create_trial(params=point.values, distributions=space, **_told(point, states)))
    known = {point.name: point for point in points}
    for _try in range(TRIES):
        trial = study.ask(space)
        values = {key: trial.params[key] for key in plan}
        if name_of(values) not in known:
            return values
        told = _told(known[name_of(values)], states)
        if told["state"] != states.RUNNING:
            study.tell(trial, told.get("value"), state=told["state"])
    return None


def _told(point: Point, states: Any) -> dict[str, Any]:
    if point.state in ("running", "dead"):
        return {"state": states.RUNNING}
    if point.state == "pruned" and point.curve:
        return {"state": states.PRUNED, "intermediate_values": dict(point.curve)}
    return {"state": states.COMPLETE, "value": point.accuracy or 0.0}
