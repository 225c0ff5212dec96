"""A thin trainer for IS-DAA: direct alignment whose pair loss is multiplied by a clipped importance ratio.

Reading order: `step` (the algorithm), `records` and `data` (files to packed pairs), `model`, `routing` (what routed gradients
carry from step to step), `train` (the loop), `checkpoint`, `config`.
"""

from isdaa_trainer.config import Config
from isdaa_trainer.train import Trainer, main

__all__ = ["Config", "Trainer", "main"]
