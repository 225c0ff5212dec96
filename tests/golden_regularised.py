"""Golden rows of objectives/regularised.py."""

from objective_cases import Golden

ROWS: list[Golden] = []
