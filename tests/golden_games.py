"""Golden rows of objectives/games.py."""

from objective_cases import Golden

ROWS: list[Golden] = []
