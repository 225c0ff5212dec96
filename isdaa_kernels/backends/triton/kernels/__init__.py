"""Triton kernels: `tiles` what they share, `products` the fused matrix products, `logits` logits in memory, `tokens` work by token;
for routed gradients `routes` the plan, `routed` the grouped products, `rest` what they leave out."""
