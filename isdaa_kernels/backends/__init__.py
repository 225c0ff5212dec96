"""One folder a backend, each with the same names:

    refusal(problem) -> str | None       why it does not take the problem, as a sentence
    describe() -> str                    what was built or found, for explain_backends
    make_plan(problem) -> Plan           tiles, workspace and matrix work; pure
    forward(problem, hidden_ND, weight_VD, targets_N, transform, ignore_index) -> (logprob_N, lse_N, kept)
    backward(problem, grad_N, hidden_ND, weight_VD, targets_N, transform, ignore_index, lse_N, kept, need_bias)
        -> (d_hidden_ND | None, d_weight_VD | None, d_bias_V | None)

logprob is fp32 (fp64 for fp64 inputs), lse fp64, `kept` the logits [kept_tokens, V] of the first scored tokens. Backends never import
each other.
"""
