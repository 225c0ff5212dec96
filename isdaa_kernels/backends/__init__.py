"""One folder a backend (`gpu` is none: it holds what triton and cuda share), each with the same names:

    refusal(problem) -> str | None       why it does not take the problem, as a sentence
    describe() -> str                    what was built or found, for explain_backends
    make_plan(problem) -> Plan           tiles, workspace and matrix work; pure
    forward(problem, hidden_ND, weight_VD, targets_N, transform, ignore_index, stats: StatsRequest)
        -> (logprob_N, stats_SN, lse_N, kept_KV)
    backward(problem, grad: TokenGradient, hidden_ND, weight_VD, targets_N, transform, ignore_index, logprob_N, lse_N, kept_KV, need_bias)
        -> (d_hidden_ND | None, d_weight_VD | None, d_bias_V | None)
    forward_logits(problem, logits_NV, targets_N, transform, ignore_index, stats: StatsRequest)
        -> (logprob_N, stats_SN, lse_N)                             the logits are not changed
    backward_logits(problem, grad: TokenGradient, logits_NV, out_NV, targets_N, transform, ignore_index, logprob_N, lse_N)
        -> None           d_logits into every row of out_NV, 0 for a token without gradient; out_NV may be logits_NV itself

logprob is fp32 (fp64 for fp64 inputs), lse fp64, `kept` the logits [kept_tokens, V] of the first scored tokens; for a routed problem a
number a block and token [B, N], and where the plan says hidden_in_forward what the forward prepared, [problem.N, D]. stats_SN has the dtype
of logprob and a row for each of stats.names, in that order: 0 for an ignored token, NaN (is_top1: 0) for one whose target is outside the
vocabulary; [0, N] when nothing is asked for. What is not asked for costs nothing; the log-probs do not depend on it.
A problem of existing logits has D = 0 and the dtype of the logits twice; logits_NV and out_NV may have any strides.
Backends never import each other.

A backend that takes problems with a `divergence` has a module `linear_kl` beside, with

    make_plan(problem) -> Plan
    forward(problem, policy: Model, reference: Model, targets_N, ignore_index) -> (divergence_N, numbers_4N, logprob_2N)
    backward(problem, grad: KlGradient, policy, reference, targets_N, ignore_index, numbers_4N, logprob_2N, need_bias)
        -> as above, of the policy

numbers_4N, fp64: the log-sum-exps of policy and reference, their difference, and the mean under p of log(p / q), of jsd log(p / m). They
are for the same backend. logprob_2N, in the dtype of the divergence: the targets' log-probs under policy and reference, 0 and NaN as there;
[0, N] where problem.divergence.logprobs is False.

Where a backend has the loss stage, a module `pair_loss`, named in `ops`, holds it:

    forward(call: PairLossCall) -> (loss [], metrics [METRICS], slope [2, P])
    backward(packing: Packing, grad [], slope, like) -> d_policy_N         in the dtype of `like`
"""
