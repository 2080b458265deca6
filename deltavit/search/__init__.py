"""Search: values of a recipe chosen on val, by trials that are ordinary runs; killed at any moment, it goes on."""

from .space import Range, Space, default_space, parse_space
from .study import Found, Search, Trial, search

__all__ = ["Found", "Range", "Search", "Space", "Trial", "default_space", "parse_space", "search"]
