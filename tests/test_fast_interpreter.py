"""tests/fast_interpreter.py: what Triton's own interpreter computes and refuses, to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
RUN = """
import sys
import torch
from isdaa_kernels import Routed, linear_logprob, linear_logprob_stats
from isdaa_kernels.stats import STATS
from isdaa_kernels.testing import make_sample
if sys.argv[2] == "fast":
    from fast_interpreter import make_fast
    make_fast()

found = []
for dtype in (torch.float32, torch.bfloat16):
    sample = make_sample(40, 24, 150, dtype, bias=True, ignored=0.2, sharpness=4.0)
    for options in ({"softcap": 5.0, "logit_scale": 0.5}, {"gradient": Routed(1e-2, block=64)}):
        def value(h, w, b):
            logprob, stats = linear_logprob_stats(
                h, w, sample.targets, bias=b, stats=STATS, detached=STATS, backend="triton", **options
            )
            found.extend(vars(stats).values())
            return logprob
        found.extend(sample.grads(value))

import triton
import triton.language as tl

@triton.jit
def halve(x):
    return x // 2

@triton.jit
def kernel(out, wrong: tl.constexpr):
    x = halve(tl.arange(0, 32)) * 2147483647 + tl.sum(tl.arange(0, 16))
    if wrong == 1:
        x = x + tl.arange(0, 16)
    if wrong == 2:
        x = x + tl.zeros([12], tl.int32)
    if wrong == 3:
        x = halve(out) + x
    tl.store(out + tl.arange(0, 32), x)

out = torch.zeros(32, dtype=torch.int32)
kernel[(1,)](out, 0)
sentences = []
for wrong in (1, 2, 3):
    try:
        kernel[(1,)](out, wrong)
        sentences.append("no error")
    except Exception as error:
        sentences.append(f"{type(error).__name__}: {error}")
torch.save(([x for x in found if x is not None] + [out], sentences), sys.argv[1])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
@pytest.mark.slow
def test_it_computes_and_refuses_what_the_original_does(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    results = []
    for way in ("fast", "original"):
        subprocess.run([sys.executable, script, tmp_path / way, way], check=True, env=environment)
        results.append(torch.load(tmp_path / way))
    (fast, fast_sentences), (original, sentences) = results
    assert len(fast) == len(original) > 40
    for a, b in zip(fast, original, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert fast_sentences == sentences
    assert all("Error: " in sentence for sentence in sentences)
