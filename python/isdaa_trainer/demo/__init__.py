"""The demonstration: `python -m isdaa_trainer.demo`."""
