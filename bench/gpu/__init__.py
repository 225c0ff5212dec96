"""Proof and measurement on an accelerator, in one command: `python -m bench.gpu_report --out DIR`.

The command (bench/gpu_report.py) lists the rows in the order of their worth (tasks), runs the tests of the device (device_tests),
then a worker in a process of its own (worker, lab) that measures row after row, and writes the report after each (journal, targets,
markdown, picture). A contender that hangs or ends the worker costs itself its figures and nobody else: a new worker goes on.
"""
