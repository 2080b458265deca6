"""Which values were tried, by whom, and what came of it: an Optuna study in SQLite, PostgreSQL or MySQL.

A trial enters as running, with all its values, in one transaction, and leaves it once: complete, pruned, or failed with
its error.  One that is failed without an error was killed or stopped: its values are tried again, in a new trial.
"""

from __future__ import annotations

import sqlite3
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ..core.errors import FileError, TrainingError
from ..core.sealed import shown
from .samplers import Point, optuna
from .space import Values, name_of

BEAT, GRACE = 30, 120
"""Seconds between the signs of life of a trial in a shared database, and of silence after which it is dead."""


class Ledger:
    """The study `name` in a file of our own, or in the database at a URL, which other processes may use too.

    Args:
        home: an SQLite file that nobody else has open, or a URL as SQLAlchemy reads it.
        space: Optuna's distribution of each key.

    Raises:
        FileError: no database can be opened there, or (from any method) it refuses to be read or written.
    """

    def __init__(self, home: Path | str, name: str, space: Mapping[str, Any]):
        self.package, self.space = optuna(), dict(space)
        self.shared = isinstance(home, str)
        self.where = shown(home) if isinstance(home, Path) else _without_password(home)
        self.states = self.package.trial.TrialState
        with self._plainly(), warnings.catch_warnings():
            warnings.simplefilter("ignore", self.package.exceptions.ExperimentalWarning)
            self.storage = self.package.storages.RDBStorage(
                home if isinstance(home, str) else "sqlite://",
                engine_kwargs={} if isinstance(home, str) else _file(home),
                heartbeat_interval=BEAT,
                grace_period=GRACE,
            )
            self.study = self.package.create_study(
                study_name=name, storage=self.storage, direction="maximize", load_if_exists=True
            )

    def points(self) -> list[Point]:
        """In the order in which they were first tried."""
        tries: dict[str, list[Any]] = {}
        for trial in self._trials():
            if "withdrawn" not in trial.user_attrs:
                tries.setdefault(name_of(trial.params), []).append(trial)
        return [self._point(some) for some in tries.values()]

    def bury(self) -> int:
        """Fail the trials whose process is gone, and say how many: all that run, where the file is ours alone."""
        found = [trial for trial in self._trials() if trial.state == self.states.RUNNING]
        if self.shared:
            with self._plainly():
                silent = set(self.storage._get_stale_trial_ids(self.study._study_id))
            long_ago = datetime.now() - timedelta(seconds=GRACE)  # killed before its first sign of life
            found = [
                trial for trial in found
                if trial._trial_id in silent or ("alive" not in trial.user_attrs and trial.datetime_start < long_ago)
            ]  # fmt: skip
        return sum(self._end(trial._trial_id, self.states.FAIL) for trial in found)

    def claim(self, values: Values, start: int) -> int | None:
        """Enter a running trial; None where another process has these values, or has done with them.

        Args:
            start: the step of the checkpoint from which it goes on.
        """
        made = self.package.trial.create_trial(
            state=self.states.RUNNING, params=dict(values), distributions=self.space, user_attrs={"start": start}
        )
        with self._plainly():
            number: int = self.storage.create_new_trial(self.study._study_id, template_trial=made)
        if self.shared:
            for other in self._trials():
                mine = other._trial_id == number
                if mine:
                    break  # of two that claim at once the first has it
                ended = other.state != self.states.FAIL or "error" in other.user_attrs
                if ended and "withdrawn" not in other.user_attrs and name_of(other.params) == name_of(values):
                    self._note(number, withdrawn=True)
                    self._end(number, self.states.FAIL)
                    return None
        return number

    def epoch(self, number: int, epoch: int, accuracy: float) -> None:
        """Note the accuracy on val after an epoch."""
        with self._plainly(), suppress(self.package.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_intermediate_value(number, epoch, accuracy)

    def settle(
        self,
        number: int,
        state: str,
        *,
        accuracy: float | None = None,
        epochs: int = 0,
        seconds: float = 0.0,
        error: str | None = None,
    ) -> bool:
        """End a trial for good; false where another process thought us dead and took it over."""
        kinds = {"complete": self.states.COMPLETE, "pruned": self.states.PRUNED, "failed": self.states.FAIL}
        self._note(number, epochs=epochs, seconds=round(seconds, 2), **({} if error is None else {"error": error}))
        return self._end(number, kinds[state], accuracy if state == "complete" else None)

    def release(self, number: int) -> None:
        """Give a trial back unfinished, because we were asked to stop."""
        self._note(number, stopped=True)
        self._end(number, self.states.FAIL)

    @contextmanager
    def alive(self, number: int) -> Iterator[None]:
        """Give signs of life while a trial runs, where others look for them."""
        if not self.shared:
            yield
            return
        with self._plainly():
            self.storage.record_heartbeat(number)
        self._note(number, alive=True)
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT):
                with suppress(Exception):  # the database is away for a moment; the trial itself will say so
                    self.storage.record_heartbeat(number)
            self.storage.remove_session()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def close(self) -> None:
        self.storage.remove_session()
        self.storage.engine.dispose()

    def _trials(self) -> list[Any]:
        with self._plainly():
            found: list[Any] = self.study.get_trials(deepcopy=False)
        return found

    def _note(self, number: int, **values: Any) -> None:
        with self._plainly(), suppress(self.package.exceptions.UpdateFinishedTrialError):
            for key, value in values.items():
                self.storage.set_trial_user_attr(number, key, value)

    def _end(self, number: int, state: Any, accuracy: float | None = None) -> bool:
        try:
            with self._plainly():
                done: bool = self.storage.set_trial_state_values(
                    number, state, None if accuracy is None else [accuracy]
                )
        except self.package.exceptions.UpdateFinishedTrialError:
            return False
        return done

    def _point(self, tries: list[Any]) -> Point:
        """All that was tried with the same values."""
        s = self.states
        settled = {s.COMPLETE: "complete", s.PRUNED: "pruned", s.FAIL: "failed"}
        for trial in tries:
            if trial.state in (s.COMPLETE, s.PRUNED) or (trial.state == s.FAIL and "error" in trial.user_attrs):
                attrs, curve = trial.user_attrs, dict(trial.intermediate_values)
                return Point(
                    trial.params, settled[trial.state], trial.value if trial.state == s.COMPLETE else None,  # type: ignore[arg-type]
                    curve, attrs["epochs"], attrs["seconds"], attrs.get("error"),
                )  # fmt: skip
        last = tries[-1]
        curve = max((dict(trial.intermediate_values) for trial in tries), key=len)
        if any(trial.state == s.RUNNING for trial in tries):
            return Point(last.params, "running", curve=curve)
        return Point(last.params, "dead", curve=curve, stuck=_stuck(tries))

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """What a database says, as one line of ours."""
        import sqlalchemy

        try:
            yield
        except self.package.exceptions.UpdateFinishedTrialError:
            raise
        except (self.package.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
            cause: BaseException = error
            while (deeper := getattr(cause, "orig", None) or cause.__cause__) is not None:
                cause = deeper
            said = " ".join(str(cause).split())[:200]
            raise FileError(f"the search's database {self.where} cannot be used: {said}; {_way_out(said)}") from None
        except ImportError as error:
            raise TrainingError(f"{self.where} needs a driver that is not installed: {error}") from None
        except RuntimeError as error:  # another version's tables
            raise FileError(f"the search's database {self.where} cannot be used: {error}") from None


def _stuck(tries: list[Any]) -> int:
    """How many of the last tries, all dead, began at the same step; those that were asked to stop do not count."""
    starts = [trial.user_attrs["start"] for trial in tries if "stopped" not in trial.user_attrs]
    return next((n for n, start in enumerate(reversed(starts)) if start != starts[-1]), len(starts))


def _file(path: Path) -> dict[str, Any]:
    """The path goes to SQLite as it is: in a URL some characters would mean something."""
    from sqlalchemy.pool import NullPool

    return {"creator": lambda: sqlite3.connect(path, timeout=60, check_same_thread=False), "poolclass": NullPool}


def _without_password(url: str) -> str:
    import sqlalchemy

    try:
        return str(sqlalchemy.make_url(url))
    except sqlalchemy.exc.ArgumentError:
        raise FileError(
            "the search's storage is no URL such as sqlite:///FILE or postgresql://USER@HOST/NAME"
        ) from None


def _way_out(said: str) -> str:
    if "full" in said or "disk I/O" in said:
        return "free some space and run the same command again: nothing finished is lost"
    if "not a database" in said or "malformed" in said:
        return "it is damaged: move it away, and the search begins again from the trials that are on the disk"
    return "put that right and run the same command again"
