"""The kernel set: what a backend for GPUs gives to the passes of this folder. One method a kernel, on tensors; the set knows grids, tiles,
strides and streams. `Shapes` is the part of it that a plan needs, without any device or compiler.

N tokens of the call, L of them live at most, T tokens of a slab, C vocabulary rows of a chunk, D hidden size, V vocabulary, S slots of
partial results, B blocks of a routed vocabulary, b of them in a chunk.

The i-th token of a slab is live where first + i < count, it is then token rows[first + i] of the call; `count` is an int32 [1] on the
device, `rows` an int64 [L]. Targets are int32, -1 for none. softcap=None: the head has none; bias=None, and any other tensor that may be
None, likewise. No kernel waits for the host, allocates, or adds in an order that is not fixed.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from isdaa_kernels.dispatch import Problem

# Of the low part of a gradient chunk in two parts: fp16 rounds off no more than the last of its 11 bits.
LOW_SCALE = 2.0**-11


class FusedTile(Protocol):
    """How a fused kernel cuts its product. The set may know more of it: the passes hand it back with each launch."""

    M: int  # tokens: a row of bias_sums for each M of a slab
    N: int  # vocabulary rows
    pieces: int  # partial results of a tile, each of N / pieces columns


@dataclass(frozen=True)
class RoutedSizes:
    gradient_rows: int  # listed tokens of a tile of `routed_gradient`: a row of mean_sums and of bias_sums each
    step: int  # tokens that `list_tokens` counts at once: a column of `starts` each


class Shapes(Protocol):
    """Pure functions of the problem."""

    name: str  # of the backend
    narrows_in_place: (
        bool  # `gradient_logits` may write 16-bit rows over the fp32 rows that it reads, each at the same address
    )
    gradient_rows: int  # tokens of a tile of `gradient_logits`: a row of bias_sums each

    def products(self, problem: Problem, aligned: bool) -> Literal["fused", "library"]:
        """How logits are made, forward and backward: by the set's own fused kernels, or by the library into fp32 chunks that
        `fold_logits` and `gradient_logits` read. aligned: the rows of the weight lie on 16-byte borders, without gaps between numbers."""

    def slab_step(self, problem: Problem) -> int:
        """Slabs are multiples of it: of the height of any tile."""

    def fused_tile(
        self, problem: Problem, kernel: Literal["forward", "backward"], rich: bool, aligned: bool
    ) -> FusedTile:
        """rich: with bias or softcap. It must not depend on the number of tokens."""

    def fold_columns(self, problem: Problem) -> int:
        """Columns of a slot of partial results of `fold_logits`: a power of two up to 2048 which, where gradients are routed, divides the
        blocks."""

    def routed_sizes(self, problem: Problem) -> RoutedSizes: ...


class Kernels(Shapes, Protocol):
    # ---- tokens

    def gather(
        self, *, hidden: Tensor, rows: Tensor, count: Tensor, scale: Tensor | None, out: Tensor, first: int
    ) -> None:
        """out [T, D] = hidden[rows[first + i]] * scale[i], rounded to out's dtype; 0 in rows that are not live. scale fp32 [T]."""

    def combine(
        self, *, partial_max: Tensor, partial_sum: Tensor, partial_entropy: Tensor | None, partial_total: Tensor | None,
        partial_squares: Tensor | None, target_logit: Tensor, targets: Tensor, rows: Tensor, count: Tensor, logprob: Tensor,
        lse: Tensor, entropy: Tensor | None, lse_stat: Tensor | None, mean_logit: Tensor | None, log_sum_sq: Tensor | None,
        is_top1: Tensor | None, first: int, V: int,
    ) -> None:  # fmt: skip
        """logprob fp32 [N], lse fp64 [N] and the statistics fp32 [N] of the slab's live tokens, from all slots [S, T] in one order.
        partial_entropy, partial_total, partial_squares are there exactly where entropy, mean_logit, log_sum_sq are."""

    def token(
        self, *, rows: Tensor, count: Tensor, top: Tensor, logprob_gradient: Tensor, prob_gradient: Tensor | None,
        log_prob_gradient: Tensor | None, flat_gradient: Tensor | None, logprob: Tensor, lse: Tensor, inverse_temperature: Tensor,
        out: Tensor | None, weight_entry: Tensor | None, first: int, logit_scale: float, softcap: float | None, least: int, shift: int,
        scaled: bool,
    ) -> None:  # fmt: skip
        """Coefficients of the backward: out fp32 [10, T], weight_entry fp32 [T]. The gradients fp32 [N], top int32 [1],
        inverse_temperature fp32 [T]. scaled: by powers of two, none of a hidden state below 2 ** least, sums in units of
        2 ** (top - shift)."""

    def finish_hidden(
        self, *, sums: Tensor, tokens: Tensor, targets: Tensor, weight: Tensor, rows: Tensor, count: Tensor, d_hidden: Tensor,
        first: int,
    ) -> None:  # fmt: skip
        """d_hidden [N, D] of the live tokens, rounded once, from sums fp32 [T, D] and the target's own entry, tokens[8]."""

    def finish_weight(
        self, *, sums: Tensor, order: Tensor, starts: Tensor, targets: Tensor, rows: Tensor, weight_entry: Tensor, hidden: Tensor,
        top: Tensor, d_weight: Tensor, mean: Tensor | None, rest: Tensor | None, vocab_order: Tensor | None, begin: int, shift: int,
        block: int,
    ) -> None:  # fmt: skip
        """Rows [begin, begin + C) of d_weight [V, D], or those at these places of vocab_order int64 [V], rounded once: sums fp32 [C, D],
        the targets' own entries, and mean fp32 [V] times rest fp32 [B, D]. order int64 [L]: live tokens by target; targets int32 [L]:
        theirs in that order; starts int32 [V + 1]: where each vocabulary row begins in it. hidden [N, D] has any strides, 0 among them."""

    # ---- logits in memory

    def fold_logits(
        self, *, logits: Tensor, rows: Tensor | None, bias: Tensor | None, targets: Tensor, inverse_temperature: Tensor, count: Tensor,
        partial_max: Tensor, partial_sum: Tensor, partial_entropy: Tensor | None, partial_total: Tensor | None,
        partial_squares: Tensor | None, target_logit: Tensor, first: int, begin: int, end: int, logit_scale: float,
        softcap: float | None, columns: int,
    ) -> None:  # fmt: skip
        """Partial results of the slab for the vocabulary rows [begin, end), from the slot begin / columns on, and target_logit fp32 [T] of
        targets among them. logits [., end - begin] of any float dtype and strides; without rows token i is row i. columns: `fold_columns`.
        bias [V]."""

    def gradient_logits(
        self, *, logits: Tensor, out: Tensor, bias: Tensor | None, targets: Tensor, tokens: Tensor, bias_sums: Tensor | None, live: Tensor,
        begin: int, end: int, logit_scale: float, softcap: float | None, log_prob: bool, flat: bool, target_entry: bool,
    ) -> None:  # fmt: skip
        """out [T, end - begin] = gradient of logits, 0 where live uint8 [T] is 0. out may be logits, or, where `narrows_in_place`, 16-bit
        numbers at the addresses of its rows. target_entry: tokens[8] stands in the target's column, else 0 does. log_prob, flat: some of
        tokens[5], tokens[6] is not 0. bias_sums fp32 [ceil(T / gradient_rows), end - begin]: sums over a tile's tokens times tokens[7]."""

    # ---- fused with the product

    def linear_logprob_forward(
        self, *, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, inverse_temperature: Tensor, count: Tensor,
        partial_max: Tensor, partial_sum: Tensor, partial_entropy: Tensor | None, partial_total: Tensor | None,
        partial_squares: Tensor | None, target_logit: Tensor, first: int, logit_scale: float, softcap: float | None, tile: FusedTile,
    ) -> None:  # fmt: skip
        """As `fold_logits`, of the product of hidden [T, D] and weight [C, D], from slot 0 on; nothing for tokens that are not live. bias
        begins with the rows' own."""

    def linear_logprob_backward(
        self, *, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, tokens: Tensor, count: Tensor, out: Tensor,
        bias_sums: Tensor | None, first: int, begin: int, end: int, logit_scale: float, softcap: float | None, log_prob: bool, flat: bool,
        tile: FusedTile,
    ) -> None:  # fmt: skip
        """out [T, end - begin] in hidden's dtype = gradient of the product for the rows [begin, end) of weight [V, D], 0 in the target's
        column and in rows that are not live. bias_sums fp32 [ceil(T / tile.M), end - begin]: nothing is written for tiles without a live
        token."""

    # ---- routes

    def block_mass(
        self, *, partial_max: Tensor, partial_sum: Tensor, rows: Tensor, count: Tensor, lse: Tensor, log_mass: Tensor, first: int,
        slots: int,
    ) -> None:  # fmt: skip
        """log_mass fp32 [B, N] of the live tokens: log-sum-exp of the `slots` slots of each block, minus lse."""

    def route(
        self, *, log_mass: Tensor, rows: Tensor, count: Tensor, size: Tensor, target_block: Tensor, rules: Tensor, route: Tensor,
        bisections: int, by_row: bool,
    ) -> None:  # fmt: skip
        """route uint8 [B, L]: 0 not routed, 1 in the gradients of weight and bias alone, 2 in that of hidden too. size fp32 [L],
        target_block int32 [L], rules fp64 [2]: the least size times mass, and the share of each block's sum, asked for by_row."""

    def list_tokens(
        self,
        *,
        route: Tensor,
        lists: Tensor,
        places: Tensor,
        starts: Tensor,
        counts: Tensor,
        begin: int,
        first: int,
        step: int,
    ) -> None:
        """Tokens of the slab that are routed to the blocks from `begin` on: lists, places int32 [>= b, T], starts int32
        [>= b, ceil(T / step) + 1], counts int32 [b]. route 2 comes first, each kind in order; places of them, -1 of others; starts:
        how many of them come before each step."""

    def routed_gradient(
        self, *, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, tokens: Tensor, log_mass: Tensor, rows: Tensor,
        lists: Tensor, counts: Tensor, ends: Tensor, out: Tensor, mean_sums: Tensor, bias_sums: Tensor | None, first: int, begin: int,
        logit_scale: float,
    ) -> None:  # fmt: skip
        """out [>= b, T, block] = gradient of the product of each block's listed tokens with its rows of weight [C, D], 0 in the target's
        column. mean_sums, bias_sums fp32 [ceil(T / gradient_rows), C]. ends int32 [b]: tiles of gradient_rows tokens up to each block's
        last. begin: the chunk's first place in the order of the blocks, in which targets are; bias [C] is the chunk's."""

    def routed_weight(
        self,
        *,
        g: Tensor,
        hidden: Tensor,
        lists: Tensor,
        counts: Tensor,
        sums: Tensor,
        skip: int,
        C: int,
        is_first: bool,
    ) -> None:
        """sums fp32 [R, D] of the chunk's rows from block `skip` on (+)= g [>= b, T, block] of each block's tokens times their rows of
        hidden [T, D]. is_first: nothing is there to add to."""

    def routed_hidden(
        self, *, g: Tensor, weight: Tensor, count: Tensor, lists: Tensor, places: Tensor, starts: Tensor, sums: Tensor, first: int,
        step: int,
    ) -> None:  # fmt: skip
        """sums fp32 [T, D] += g of each block that a token is routed to, route 2, times the block's rows of weight [C, D]."""

    def rest_weight(
        self, *, route: Tensor, log_mass: Tensor, rows: Tensor, count: Tensor, tokens: Tensor, hidden: Tensor, poison: Tensor, sums: Tensor,
        first: int, logit_scale: float, is_first: bool,
    ) -> None:  # fmt: skip
        """sums fp32 [B, D] (+)= the coefficients times the mass that is not routed at all, times hidden [T, D] (fp32 or 16-bit; D may be
        1). is_first: poison fp32 [1] is there to add to."""

    def rest_hidden(
        self, *, route: Tensor, log_mass: Tensor, rows: Tensor, count: Tensor, tokens: Tensor, mean: Tensor, sums: Tensor, first: int,
        logit_scale: float, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """sums fp32 [T, D] += the same of routes 0 and 1, times mean fp32 [B, D]. dtype: of the halves that both factors are split in, or
        fp32."""

    def block_sums(
        self, *, mean_sums: Tensor, bias_sums: Tensor | None, counts: Tensor, mean: Tensor, bias: Tensor | None, block: int, rows: int,
        is_first: bool, is_last: bool,
    ) -> None:  # fmt: skip
        """mean fp32 [C] (+)= the sums of the tiles that each block has, of `rows` tokens each; is_last: each block's is then made a
        distribution, uniform where nothing was routed. bias fp32 [C] likewise, as it is."""

    def block_mean(self, *, weight: Tensor, mean: Tensor, out: Tensor, block: int) -> None:
        """out fp32 [b, D] = the mean of each block's rows of weight [C, D] under mean fp32 [C]."""
