"""Other people's trainers and losses on these kernels: one file a library, imported only when asked for.

patching.py            what the others share: attributes replaced and put back
cross_entropy.py       what drop-in cross entropies share
trl.py                 the fused LM head of TRL's trainers
trl_trainer.py         TRL's DPOTrainer with the objectives of this package
transformers.py        the loss of a causal LM, `model(..., labels=...)`
liger.py               Liger's fused linear losses, those of preferences and tokens
liger_policy.py        its GRPO
liger_distillation.py  its Jensen-Shannon divergence
cut_cross_entropy.py   the function of cut-cross-entropy
torch_nn.py            torch.nn.functional.linear_cross_entropy
llama_factory.py       LLaMA-Factory's trainers
axolotl.py             a plugin of Axolotl
"""
