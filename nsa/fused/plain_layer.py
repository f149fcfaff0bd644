"""A layer of plain modules, forward and backward, from its input and parameters to its output.

One product projects all, and another computes for both compressors what two would. What calls this
is in :mod:`nsa.fused.plain_layer_ops`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from nsa.fused import kernel_calls
from nsa.fused.call_tensors import Inputs, Saved
from nsa.fused.compressor_pair import compress_pair, compress_pair_backward, weights_of
from nsa.fused.layer_call import (
    DIFFERENTIABLE,
    OF_COMPRESSORS,
    OF_HEADS,
    OF_PRODUCT,
    LayerCall,
    LayerInputs,
    LayerSaved,
    cast,
)
from nsa.fused.schedule import run_backward, run_forward
from nsa.precision import without_autocast


def run_layer(
    call: LayerCall, given: LayerInputs, *, save: bool
) -> tuple[Tensor, LayerSaved | None, list[Saved]]:
    """The output, and with ``save`` what backward needs: of the layer, and of each chunk of
    attention."""
    x = given.x
    with torch.cuda.device_of(x), without_autocast(x.device):
        saved = project(call, given)
        inputs = saved.inputs(call.gate_weight(given))
        kept = saved if save else None
        del saved  # frees what the compressors and the gates had between their layers
        out, of_attention = run_forward(inputs, None, call.plan, call.schedule, save=save)
        out = call.layer_form(out).flatten(-2)
        y = linear(out, given.out.to(x.dtype), cast(given.out_bias, x.dtype))
    return y, None if kept is None else kept._replace(out=out), of_attention


def project(call: LayerCall, given: LayerInputs) -> LayerSaved:
    """The inputs of attention, and what the backward of what makes them needs; no output."""
    weight, joined = call.joined(given, given.compressors)
    x, product = given.x, linear(given.x, weight)
    hidden, gates, rows, rows_hidden, k_cmp, v_cmp = (None,) * 6
    if given.gate is not None:
        hidden, gates = _gates(call, given, product[..., -len(given.gate) :])
    if call.places is not None:
        both = call.first_branch(product)
        k_cmp, v_cmp, rows, rows_hidden = compress_pair(
            both, call.places, given.compressors, joined
        )
        shape = (*x.shape[:-2], -1, call.kv_heads, call.head_dim)
        k_cmp = call.kernel_form(call.rotate_blocks(k_cmp.view(shape)))
        v_cmp = call.kernel_form(v_cmp.view(shape))
    heads: dict[str, Any] = dict.fromkeys(OF_HEADS) | call.split(product)
    return LayerSaved(
        out=None,
        rows=rows,
        rows_hidden=rows_hidden,
        hidden=hidden,
        **heads,
        gates=gates,
        k_cmp=k_cmp,
        v_cmp=v_cmp,
    )


def _gates(call: LayerCall, given: LayerInputs, product: Tensor) -> tuple[Tensor, Tensor]:
    """``hidden`` and ``gates``, from what the first layer of the MLP gives without its bias."""
    assert given.gate_bias is not None
    assert given.last_gate is not None
    dtype = product.dtype
    hidden = product + given.gate_bias.to(dtype)
    last_bias = cast(given.last_gate_bias, dtype)
    logits = linear(silu(hidden), given.last_gate.to(dtype), last_bias)
    gates = logits.sigmoid_().unflatten(-1, (call.heads, 3))
    return hidden, gates if len(call.leading) == 2 else gates[None]


def run_layer_backward(
    call: LayerCall,
    given: LayerInputs,
    dout: Tensor,
    saved: list[LayerSaved],
    of_attention: list[Saved],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the tensors in ``given`` but the last, None of those that are not ``wanted``.

    ``saved`` has what the layer saved. It and ``of_attention`` are emptied, so that what is used up
    frees its memory.
    """
    x, grads = given.x, dict[str, Tensor]()
    names = {name for name, want in zip(DIFFERENTIABLE, wanted, strict=True) if want}
    kept = saved.pop()
    with torch.cuda.device_of(x), without_autocast(x.device):
        if "out" in names:
            assert kept.out is not None
            grads["out"] = dout.flatten(0, -2).mT @ kept.out.flatten(0, -2)
        if "out_bias" in names:
            grads["out_bias"] = dout.new_empty(dout.shape[-1])
            kernel_calls.column_sums(dout.flatten(0, -2), grads["out_bias"], None, None)
        dout = (dout @ given.out.to(x.dtype)).unflatten(-1, (call.heads, call.head_dim))
        inputs = kept.inputs(call.gate_weight(given))
        kept = kept._replace(out=None)
        found = run_backward(
            call.kernel_form(dout), inputs, None, of_attention, call.plan, call.schedule
        )
        hidden, gates = kept.hidden, kept.gates
        of_rows = [x for x in (kept.rows, kept.rows_hidden) if x is not None]
        del dout, inputs, kept
        if "gate_proj_weight" in names:
            assert found.gate_proj_weight is not None
            grads["gate_proj_weight"] = call.channels(found.gate_proj_weight)
        weight, joined = call.joined(
            given, weights_of(given.compressors) if of_rows else [], product="x" in names
        )
        drows, dhidden, parts = None, None, dict[str, Tensor]()
        if of_rows:
            drows = _compressors_backward(call, given, found, of_rows, joined, names, parts)
        if hidden is not None:
            assert gates is not None
            assert found.gates is not None
            dhidden = _gates_backward(given, hidden, gates, found.gates, names, grads)
        dproduct = call.join_gradients(found, dhidden, drows)
        del found, dhidden, drows
        if "x" in names:
            grads["x"] = dproduct @ weight
        del weight, joined
        _weight_gradients(call, given, dproduct, names, grads, parts)
    named = zip(DIFFERENTIABLE, given, strict=False)
    return [
        None if t is None or name not in names else grads[name].to(t.dtype) for name, t in named
    ]


def _gates_backward(
    given: LayerInputs,
    hidden: Tensor,
    gates: Tensor,
    dgates: Tensor,
    names: set[str],
    grads: dict[str, Tensor],
) -> Tensor:
    """The gradient of ``hidden``; puts those of the MLP's other parameters into ``grads``.

    That of the logits takes the place of ``dgates``.
    """
    assert given.last_gate is not None
    rows = hidden.flatten(0, -2)
    gates, dlogits = (x.flatten(0, 1).flatten(1) for x in (gates, dgates))
    sums = [x.new_empty(x.shape[-1]) for x in (dlogits, rows)]
    kernel_calls.activation_gradient("sigmoid", dlogits, gates, sums[0])
    dhidden = dlogits @ given.last_gate.to(dlogits.dtype)
    active = kernel_calls.activation_gradient("silu", dhidden, rows, sums[1])
    if "last_gate" in names:
        assert active is not None
        grads["last_gate"] = dlogits.mT @ active
    grads |= {"last_gate_bias": sums[0], "gate_bias": sums[1]}
    return dhidden.view(hidden.shape)


def _compressors_backward(
    call: LayerCall,
    given: LayerInputs,
    found: Inputs,
    of_rows: list[Tensor],
    joined: Tensor,
    names: set[str],
    parts: dict[str, Tensor],
) -> Tensor:
    """The gradient of the rows that the compressors take; puts those of their parameters into
    ``parts``.

    ``of_rows`` are what they saved. It is emptied.
    """
    dk_cmp = call.rotate_blocks(call.layer_form(found.k_cmp), inverse=True)
    drows, of_compressors = compress_pair_backward(
        dk_cmp.flatten(0, -3),
        call.layer_form(found.v_cmp).flatten(0, -3),
        of_rows,
        given.compressors,
        joined,
        trained=not names.isdisjoint(OF_COMPRESSORS),
    )
    parts |= zip(OF_COMPRESSORS, of_compressors, strict=False)
    return drows


def _weight_gradients(
    call: LayerCall,
    given: LayerInputs,
    dproduct: Tensor,
    names: set[str],
    grads: dict[str, Tensor],
    parts: dict[str, Tensor],
):
    """Puts the gradients of the projections' weights into ``grads``, and copies of those that are
    ``parts`` of a tensor, because who holds one gradient would hold all. One launch copies all."""
    targets = list(map(_contiguous_like, (getattr(given, name) for name in parts)))
    sources = list(parts.values())
    grads |= zip(parts, targets, strict=True)
    wanted = names.intersection(OF_PRODUCT)
    if wanted:
        weights = given.projections
        copies = list(map(_contiguous_like, weights))
        grads |= zip(OF_PRODUCT, copies, strict=False)
        pieces = call.pieces(copies)
        sizes, drows, rows = list(map(len, pieces)), dproduct.flatten(0, -2), given.x.flatten(0, -2)
        if len(wanted) == len(weights):
            targets += pieces
            sources += (drows.mT @ rows).split(sizes)
        else:
            owners = ["q", *("k", "v") * call.branches, "gate"]
            for owner, piece, part in zip(owners, pieces, drows.split(sizes, -1), strict=False):
                if owner in wanted:
                    piece.copy_(part.mT @ rows)
    if targets:
        torch._foreach_copy_(targets, sources)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
