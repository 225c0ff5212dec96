"""Golden rows of objectives/listwise.py."""

from objective_cases import Golden

ROWS: list[Golden] = []
