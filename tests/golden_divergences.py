"""Golden rows of objectives/divergences.py."""

from objective_cases import Golden

ROWS: list[Golden] = []
