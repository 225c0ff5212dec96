"""Benchmarks of token log-probs and preference losses against dense PyTorch and the fused peers, on real hidden states.

    python -m bench                      every contender: time in units, peak memory in a process of its own, error against fp64
    python -m bench --quick              the same on fewer tokens with fewer repeats, in a few minutes
    python -m bench.linear_kl            the divergence of two heads against dense PyTorch and TRL
    pytest bench --benchmark-only        the timings through pytest-benchmark
    python -m bench.gpu_report --out DIR proof and measurement on a GPU, against more peers, on states as sharp as a real model's

A unit is the time of `torch.mm(hidden, weight.T, out=preallocated)` in fp32 on the same shapes, run just before each timed call.
A contender whose values or gradients are wrong is reported as such and gets no number; one that is not installed is listed.
"""
