"""Golden rows of objectives/reference_free.py."""

from objective_cases import Golden

ROWS: list[Golden] = []
