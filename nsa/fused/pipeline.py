"""The stages of Native Sparse Attention in order, forward and backward.

Queries are ``(B, T, H, D)``, keys ``(B, Tk, H_kv, D)``, with ``B = 1`` for packed input.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from nsa.fused.attention import (
    closing_attention,
    closing_window,
    compressed_attention,
    compressed_attention_backward,
    compressed_lse,
    selected_attention,
    selected_attention_backward,
    window_attention,
    window_attention_backward,
)
from nsa.fused.call_tensors import BranchResults, Inputs, made
from nsa.fused.compressed_forms import CompressedForm
from nsa.fused.compression import compress, compress_pair
from nsa.fused.fa4_call import new_query_sums
from nsa.fused.gating import (
    GatingGradients,
    combine_branches,
    combine_branches_backward,
    gradient_of_sums,
    other_gradients,
    query_gradient,
)
from nsa.fused.kernel_inputs import Pair, Placements
from nsa.fused.key_gradients import key_gradients
from nsa.fused.key_sums import CallSums, leaves_sums, new_sums
from nsa.fused.near_blocks import join_near_blocks
from nsa.fused.plan import Plan
from nsa.fused.selection import select_blocks, select_blocks_and_groups, select_groups
from nsa.fused.streams import SideStream
from nsa.precision import without_autocast

SHORT_TOKENS = 1 << 12
"""Tokens of a batch up to which the window comes first."""


def attend(
    inputs: Inputs,
    block_indices: Tensor | None,
    groups: Tensor | None,
    plan: Plan,
    out: Tensor | None = None,
    before_keys: Callable[[], None] | None = None,
    *,
    combines: bool = True,
    keep: bool = True,
    keep_window: bool = True,
) -> tuple[Tensor | None, BranchResults | None, Tensor, Tensor | None]:
    """The three branches and their gated sum.

    Where the last kernel has the output of its branch at hand, it adds the branches up: the
    window's in long batches, else the selected branch's in token mode.

    Args:
        inputs: of the call.
        block_indices: ``(B, tiles, H, n)`` in tile mode, ``(B, T, H_kv, n)`` in token mode; None to
            select.
        groups: of the compressed branch; None to select where needed.
        plan: the sequences.
        out: where to write the sum ``(B, T, H, Dv)``: a contiguous tensor, or a slice of heads of
            one. By default a new tensor.
        before_keys: is called before keys and values are read; compressed ones are given then.
        combines: whether the sum is wanted.
        keep: whether the results of the branches are.
        keep_window: whether those of the window are among these.

    Returns:
        The sum, the results of the branches, and the ``block_indices`` and ``groups`` that they
        attended. What is not wanted is None.
    """
    q, token_mode = inputs.q, plan.config.selection == "token"
    (k_slc, v_slc), (k_win, v_win) = inputs.keys_and_values()
    window_last = combines and _window_comes_last(q, plan)
    # In tile mode the selection and its branch then run beside the compressed one, but for groups.
    selects_beside = (
        window_last and not token_mode and plan.compressed_form is not CompressedForm.LISTED
    )
    side_stream = nullcontext() if window_last else SideStream(q)
    o_win = lse_win = None
    if before_keys is None and not window_last:
        # It needs no plan tensors, and runs while the host prepares the rest.
        o_win, lse_win = window_attention(q, k_win, v_win, plan)
    with side_stream:
        k_cmp, v_cmp = _compressed_pair(inputs, plan)
        q_rows = plan.align_queries(q)
        if not token_mode and not selects_beside:
            block_indices, groups = _select_missing(q_rows, k_cmp, block_indices, groups, plan)
        beside = SideStream(q, recorded=True) if selects_beside else nullcontext()
        o_cmp, lse_cmp = compressed_attention(q, q_rows, k_cmp, v_cmp, groups, plan)
        if token_mode and block_indices is None:
            block_indices = _select_by_token(q, q_rows, k_cmp, lse_cmp, plan)
    o_slc: Tensor | None
    closes = combines and plan.has_band and not window_last
    gates: dict[str, Any] = dict(
        gates=inputs.gates, gate_proj_weight=inputs.gate_proj_weight, out=out
    )
    with beside:
        if selects_beside:
            block_indices, groups = _select_missing(q_rows, k_cmp, block_indices, groups, plan)
        assert block_indices is not None  # as by now they are selected
        if before_keys is not None:
            # What needs no keys has come first.
            before_keys()
            if not window_last:
                o_win, lse_win = window_attention(q, k_win, v_win, plan)
        if closes:
            out, o_slc, lse_slc = closing_attention(
                q_rows, k_slc, v_slc, block_indices, others=(o_cmp, made(o_win)),
                plan=plan, keep=keep, **gates,
            )  # fmt: skip
        else:
            o_slc, lse_slc = selected_attention(q_rows, k_slc, v_slc, block_indices, plan)
    del q_rows
    if window_last:
        out, o_win, lse_win = closing_window(
            q, k_win, v_win, others=(o_cmp, made(o_slc)),
            plan=plan, keep=keep and keep_window, **gates,
        )  # fmt: skip
    elif combines and not closes:
        placements = plan.query_placements(q.shape[2], inputs.k.shape[2])
        branches = (o_cmp, made(o_slc), made(o_win))
        out = combine_branches(branches, q, placements=placements, **gates)
    if not keep:
        return out, None, block_indices, groups
    results = BranchResults(
        o_cmp=o_cmp, lse_cmp=lse_cmp, o_slc=made(o_slc), lse_slc=lse_slc,
        o_win=o_win if keep_window else None, lse_win=lse_win if keep_window else None,
        k_cmp=k_cmp if inputs.k_cmp is None else None,
        v_cmp=v_cmp if inputs.v_cmp is None else None,
    )  # fmt: skip
    return out, results, block_indices, groups


def _window_comes_last(q: Tensor, plan: Plan) -> bool:
    """Whether the last kernel is the window's: not in short calls, where the window runs while the
    host prepares the rest.

    Chunks of heads have as many tokens as the whole call, so that their results have the same bits.
    """
    return not plan.packed and q.shape[0] * q.shape[1] > SHORT_TOKENS


def _compressed_pair(inputs: Inputs, plan: Plan) -> Pair:
    """Compressed keys and values: the caller's or the mean."""
    if inputs.k_cmp is not None and inputs.v_cmp is not None:
        return inputs.k_cmp, inputs.v_cmp
    return compress_pair(inputs.k, inputs.v, inputs.compress_weights, plan)


def attend_window(inputs: Inputs, branches: BranchResults, plan: Plan) -> BranchResults:
    """``branches`` with those of the window computed again."""
    _, (k_win, v_win) = inputs.keys_and_values()
    o_win, lse_win = window_attention(inputs.q, k_win, v_win, plan)
    return branches._replace(o_win=o_win, lse_win=lse_win)


@torch.no_grad()
def select(
    q: Tensor, k: Tensor, compress_k_weight: Tensor | None, compressed: bool, plan: Plan
) -> Tensor:
    """The blocks that :func:`attend` selects.

    ``k (B, Tk, H_kv, D)`` is compressed, unless it is ``compressed`` ``(B, M, H_kv, D)``.
    """
    with torch.cuda.device_of(q), without_autocast(q.device):
        k_cmp = k if compressed else compress(k, compress_k_weight, plan)
        # The first queries of the tiles of one sequence need no other rows.
        single = plan.batch == 1 and plan.geometry.queries.rows.single
        in_place = single and plan.config.tile_summary == "first"
        q_rows = q if in_place else plan.align_queries(q)
        if plan.config.selection == "tile":
            return select_blocks(q_rows, k_cmp, None, plan)
        # Only the log-sum-exp is used, so the values do not matter.
        _, lse_cmp = compressed_attention(q, q_rows, k_cmp, k_cmp, None, plan)
        return _select_by_token(q, q_rows, k_cmp, lse_cmp, plan)


def _select_by_token(q: Tensor, q_rows: Tensor, k_cmp: Tensor, lse: Tensor, plan: Plan) -> Tensor:
    """Token mode's blocks, from the log-sum-exp of :func:`compressed_attention`."""
    return select_blocks(q_rows, k_cmp, compressed_lse(lse, q, plan), plan)


def _select_missing(
    q_rows: Tensor, k_cmp: Tensor, blocks: Tensor | None, groups: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor | None]:
    """Blocks and, if configured, groups. Those that are None are selected."""
    missing_groups = plan.config.num_cmp_selected_blocks is not None and groups is None
    if blocks is None and missing_groups:
        return select_blocks_and_groups(q_rows, k_cmp, plan)
    if blocks is None:
        blocks = select_blocks(q_rows, k_cmp, None, plan)
    if missing_groups:
        groups = select_groups(q_rows, k_cmp, plan)
    return blocks, groups


def backward(
    dout: Tensor,
    inputs: Inputs,
    saved: list[BranchResults],
    block_indices: Tensor,
    groups: Tensor | None,
    plan: Plan,
    dq: Tensor | None = None,
    keys: CallSums | None = None,
    *,
    deterministic: bool = False,
) -> Inputs:
    """The gradient of each input, None if there is no such input.

    Args:
        dout: gradient of the sum.
        inputs: of the call.
        saved: the results of the branches, which are taken out, so that their memory is freed.
        block_indices, groups: what :func:`attend` returned.
        plan: the sequences.
        dq: where to write the gradient of ``q``: a contiguous tensor, or a slice of heads of one.
        keys: what to add the gradients of ``k`` and ``v`` to, if all branches share them and their
            compressed ones are given too.
        deterministic: give the same bits each time.

    Branches run one after another. Each is freed before the next, except its gradients. One pass
    at the end adds those of ``q``, and another those of ``k`` and ``v`` if branches share them.
    """
    q = inputs.q
    (k_slc, v_slc), (k_win, v_win) = inputs.keys_and_values()
    shared = inputs.k_slc is None
    if not (shared and inputs.k_cmp is not None and plan.keys_in_place):
        keys = None
    given = inputs.k_cmp is not None
    summed = shared and keys is None and leaves_sums(plan, given=given, deterministic=deterministic)
    placements = plan.query_placements(q.shape[2], inputs.k.shape[2])
    branches = saved.pop()
    k_cmp, v_cmp = branches.k_cmp, branches.v_cmp
    gating = _gating_backward(dout, inputs, branches, placements, plan)
    douts, (statistics_cmp, statistics_slc, statistics_win) = list(gating.douts), gating.statistics
    dlogits, dgates, dgate_weight = gating[2:]
    del gating, branches
    near_block = None
    if shared and plan.joins_near_blocks and douts[1] is douts[2]:
        near_block = plan.config.select_block_size
        statistics_win, block_indices = join_near_blocks(
            statistics_win, statistics_slc, block_indices,
            first=plan.first_position, block_size=near_block,
        )  # fmt: skip

    query_sums = new_query_sums(q) if plan.sums_queries(q.shape[2], inputs.k.shape[2]) else None
    # Branches that add to the same sums in a fixed order run one after the other.
    waits = deterministic and query_sums is not None
    side_stream = None if waits else SideStream(q)
    dq_win, dk_win, dv_win = window_attention_backward(
        douts.pop(), q, k_win, v_win, statistics_win, plan, deterministic, query_sums, near_block
    )
    del statistics_win
    side_stream = side_stream or SideStream(q)

    # The last kernel of token mode's selected branch then gives the whole gradient.
    token_mode = plan.config.selection == "token"
    last = query_sums is not None and token_mode

    def selected() -> tuple[Tensor, Tensor, Tensor]:
        others = None
        if last and query_sums is not None:
            others = other_gradients(query_sums, dlogits, inputs.gate_proj_weight, dq)
        return selected_attention_backward(
            douts.pop(), q, k_slc, v_slc, statistics_slc, block_indices, plan,
            deterministic=deterministic, others=others,
            sums=new_sums(inputs.k) if summed else None if keys is None else keys.selected,
        )  # fmt: skip

    with side_stream:
        # The compressed branch leaves less memory, but in token mode the selected needs more.
        if token_mode and not last:
            dq_slc, dk_slc, dv_slc = selected()
        pair = _compressed_pair(inputs, plan) if k_cmp is None or v_cmp is None else (k_cmp, v_cmp)
        dq_cmp, dk_cmp, dv_cmp = compressed_attention_backward(
            douts.pop(0), q, pair[0], pair[1], statistics_cmp, groups, plan,
            deterministic=deterministic, query_sums=query_sums,
        )  # fmt: skip
        del pair
        if not token_mode:
            dq_slc, dk_slc, dv_slc = selected()
    if last:
        # After the block, because it needs what the window has added.
        dq_slc, dk_slc, dv_slc = selected()
    dq = _add_query_gradients(
        (dq_cmp, dq_slc, dq_win), query_sums=query_sums, dlogits=dlogits,
        weight=inputs.gate_proj_weight, dq=dq, plan=plan, placements=placements,
    )  # fmt: skip
    del dq_cmp, dq_slc, dq_win
    query_sums = None
    gradients = key_gradients(
        inputs, (dk_cmp, dv_cmp), (dk_slc, dv_slc), (dk_win, dv_win), plan, keys, summed=summed
    )
    return gradients._replace(q=dq, gates=dgates, gate_proj_weight=dgate_weight)


def _add_query_gradients(
    dqs: tuple[Tensor | None, Tensor, Tensor | None],
    *,
    query_sums: Tensor | None,
    dlogits: Tensor | None,
    weight: Tensor | None,
    dq: Tensor | None,
    plan: Plan,
    placements: Placements,
) -> Tensor:
    """The gradient of ``q``, in ``dq`` if that is given.

    ``dqs`` are of the compressed, selected and window branch; None of those in ``query_sums``.
    """
    dq_cmp, dq_slc, dq_win = dqs
    if query_sums is not None and plan.config.selection == "token":
        return dq_slc if dq is None else dq
    if query_sums is not None:
        scale = plan.config.softmax_scale(dq_slc.shape[-1])
        return gradient_of_sums(query_sums, dq_slc, dlogits, weight, scale, dq)
    assert dq_cmp is not None  # as without sums
    assert dq_win is not None
    out = dq_win if dq is None else dq
    return query_gradient((dq_cmp, dq_slc, dq_win), dlogits, weight, out=out, placements=placements)


def _gating_backward(
    dout: Tensor, inputs: Inputs, branches: BranchResults, placements: Placements, plan: Plan
) -> GatingGradients:
    """What the gated sum leaves to the backwards of the branches, and its own gradients."""
    q = inputs.q
    statistics_placements = plan.statistics_placements(q.shape[2], inputs.k.shape[2])
    assert branches.lse_win is not None  # as of o_win
    lse_cmp = None if statistics_placements[0] is None else branches.lse_cmp
    return combine_branches_backward(
        dout,
        branches.outputs,
        (lse_cmp, branches.lse_slc, branches.lse_win),
        q,
        inputs.gates,
        inputs.gate_proj_weight,
        statistics_placements,
        placements,
    )
