"""Golden rows of objectives/imitation.py."""

from objective_cases import Golden

ROWS: list[Golden] = []
