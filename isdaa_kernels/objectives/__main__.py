"""Prints docs/objectives.md."""

from isdaa_kernels.objectives.table import page

print(page(), end="")
