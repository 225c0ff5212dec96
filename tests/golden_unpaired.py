"""Golden rows of objectives/unpaired.py."""

from objective_cases import Golden

ROWS: list[Golden] = []
