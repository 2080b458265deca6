"""`python -m deltavit` is `deltavit`."""

from .cli import main

main()
