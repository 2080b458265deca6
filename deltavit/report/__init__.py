"""Tables, statistics, pictures and pages of a benchmark, as pure functions of its records."""

from .summary import summary

__all__ = ["summary"]
