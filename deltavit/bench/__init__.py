"""The benchmark lab: suites of many runs, on one machine or many, whose results are plain files."""

from .bench import Outcome, bench, estimate
from .record import read_records
from .suite import Suite, read_suite

__all__ = ["Outcome", "Suite", "bench", "estimate", "read_records", "read_suite"]
