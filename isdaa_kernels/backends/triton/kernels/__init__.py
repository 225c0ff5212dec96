"""Triton kernels: `tiles` what they share, `products` the fused matrix products, `logits` logits in memory, `tokens` work by token."""
