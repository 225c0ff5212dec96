"""Other people's trainers on these kernels: one file a library, imported only when asked for.

patching.py      what the others share: attributes replaced and put back
trl.py           the fused LM head of TRL's trainers
trl_trainer.py   TRL's DPOTrainer with the objectives of this package
"""
