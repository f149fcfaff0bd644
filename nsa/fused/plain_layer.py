"""A layer of plain modules as one custom op, forward and backward, for compiled calls.

torch.compile cannot see what a recorded call does, and an op, a product or a Triton kernel takes
the host longer than a step of a recording. So a compiled layer is one op, whose inside is recorded.
What its backward needs are results of the op, whose shapes follow from those of its inputs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from nsa.blocks import BlockPlaces
from nsa.fused import kernel_calls, ops
from nsa.fused.call_tensors import Inputs
from nsa.fused.compressed_forms import num_compressed_bound
from nsa.fused.custom_ops import custom_op
from nsa.fused.entry import widen
from nsa.fused.kernel_inputs import kernel_head_dim
from nsa.fused.layer_ops import compress_pair, compress_pair_backward
from nsa.fused.op_arguments import OpOptions, schema_of
from nsa.precision import without_autocast


class LayerInputs(NamedTuple):
    """The tensors of a call: hidden states ``(B, N, dim)`` or ``(T, dim)``; parameters; and where
    the compressed blocks of each packed sequence start, then where the last end.

    Parameters are weights of linear layers and their biases; of the gates' MLP, or
    ``gate_proj_weight``; of both compressors, in the order of
    :func:`nsa.fused.layer_ops.compress_pair`.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    gate_bias: Tensor | None
    last_gate: Tensor | None
    last_gate_bias: Tensor | None
    gate_proj_weight: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    position_k: Tensor
    position_v: Tensor
    first_k: Tensor
    first_v: Tensor
    first_bias_k: Tensor
    first_bias_v: Tensor
    last_k: Tensor
    last_v: Tensor
    last_bias_k: Tensor
    last_bias_v: Tensor
    block_bounds: Tensor | None

    @property
    def projections(self) -> list[Tensor]:
        """What ``x`` is multiplied by, all in one product."""
        return [w for w in (self.q, self.k, self.v, self.gate) if w is not None]

    @property
    def compressors(self) -> list[Tensor]:
        return [x for x in self[_FIRST_OF_COMPRESSORS:-1] if x is not None]


NUM_INPUTS = len(LayerInputs._fields)
_DIFFERENTIABLE = LayerInputs._fields[:-1]
_FIRST_OF_COMPRESSORS = LayerInputs._fields.index("position_k")


class _LayerSaved(NamedTuple):
    """What backward needs beside the results of attention, whose inputs come last.

    ``rows`` and the next two are of the compressors; ``hidden`` and ``active``, before and after
    the activation, of the gates' MLP.
    """

    out: Tensor
    rows: Tensor
    rows_hidden: Tensor
    rows_active: Tensor
    hidden: Tensor | None
    active: Tensor | None
    gates: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor


_NUM_SAVED = len(_LayerSaved._fields)


class _Rule(NamedTuple):
    """What a call does, but for the values of its tensors.

    ``places`` are those of compressed blocks, and ``leading`` the dimensions of the tokens.
    """

    theta: float
    places: BlockPlaces
    leading: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, theta: float, given: LayerInputs, options: OpOptions) -> "_Rule":
        (*leading, _), dim = given.x.shape, given.position_k.shape[-1]
        config = options.scaled_config
        entries = leading[0] if len(leading) == 2 else 1
        blocks = num_compressed_bound(leading[-1], options.cu_seqlens is not None, config)
        places = BlockPlaces(
            block_size=config.compress_block_size,
            stride=config.compress_stride,
            blocks=entries * blocks,
            entry_tokens=leading[-1],
            entry_blocks=blocks,
            token_bounds=options.cu_seqlens,
            block_bounds=given.block_bounds,
        )
        return cls(
            theta=theta,
            places=places,
            leading=tuple(leading),
            heads=given.q.shape[0] // dim,
            kv_heads=given.k.shape[0] // dim,
            head_dim=dim,
        )

    def rotate(self, q: Tensor, k: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Tokens rotated by their positions, or back."""
        bounds = self.places.token_bounds
        q, rotated = kernel_calls.rotate(q, k, bounds, None, 0.0, 1, self.theta, inverse)
        assert rotated is not None  # as k is given
        return q, rotated

    def rotate_blocks(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """Compressed tokens rotated by the positions of their centres, or back."""
        places, centre = self.places, (self.places.block_size - 1) / 2
        return kernel_calls.rotate(
            x, None, places.block_bounds, None, centre, places.stride, self.theta, inverse
        )[0]

    @property
    def kernel_dim(self) -> int:
        """Channels of heads as attention gets them."""
        return kernel_head_dim(self.head_dim, self.head_dim)

    def kernel_form(self, x: Tensor) -> Tensor:
        """Queries or keys as attention gets them."""
        return widen(x if len(self.leading) == 2 else x[None], self.kernel_dim)

    def layer_form(self, x: Tensor | None) -> Tensor:
        """The reverse, of a tensor that is there."""
        assert x is not None
        return (x if len(self.leading) == 2 else x[0])[..., : self.head_dim].contiguous()


def _attention_inputs(saved: _LayerSaved, weight: Tensor | None) -> Inputs:
    return Inputs(
        q=saved.q,
        k=saved.k,
        v=saved.v,
        k_slc=None,
        v_slc=None,
        k_win=None,
        v_win=None,
        gates=saved.gates,
        gate_proj_weight=weight,
        compress_k_weight=None,
        compress_v_weight=None,
        k_cmp=saved.k_cmp,
        v_cmp=saved.v_cmp,
    )


def run_layer(theta: float, given: LayerInputs, options: OpOptions) -> list[Tensor]:
    """The output, then what backward needs if ``options`` say so."""
    x, rule = given.x, _Rule.of(theta, given, options)
    with torch.cuda.device_of(x), without_autocast(x.device):
        product = linear(x, _joined(given.projections, x.dtype))
        q, kv, *rest = product.split(_columns(given), -1)
        q, both = (part.unflatten(-1, (-1, rule.head_dim)) for part in (q, kv))
        k, v = both.split(rule.kv_heads, -2)
        of_gates = _gates(given, rule, rest)
        *compressed, rows, hidden, active = compress_pair(both, rule.places, given.compressors)
        blocks = (*x.shape[:-2], rule.places.entry_blocks, *k.shape[-2:])
        k_cmp, v_cmp = (part.view(blocks) for part in compressed)
        # A copy, because a view would keep the product.
        heads = (*rule.rotate(q, k), v.clone(), rule.rotate_blocks(k_cmp), v_cmp)
        saved = _LayerSaved(x, rows, hidden, active, *of_gates, *map(rule.kernel_form, heads))
        weight = _gate_weight(given, rule)
        out, *of_attention = ops.run_attention(_attention_inputs(saved, weight), options)
        out = rule.layer_form(out).flatten(-2)
        y = linear(out, given.out.to(x.dtype), _cast(given.out_bias, x.dtype))
    if not options.save:
        return [y]
    return [y, *(ops.owned(part, x) for part in saved._replace(out=out)), *of_attention]


def _columns(given: LayerInputs) -> list[int]:
    """Columns of the product: of queries, keys and values, and the gates' MLP."""
    q, k, v, *rest = map(len, given.projections)
    return [q, k + v, *rest]


def _joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(list(weights)).to(dtype)


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _gates(
    given: LayerInputs, rule: _Rule, rest: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``hidden``, ``active`` and ``gates``, from what the first layer of the MLP gives."""
    if not rest:
        return None, None, None
    assert given.gate_bias is not None
    assert given.last_gate is not None
    dtype = rest[0].dtype
    hidden = rest[0] + given.gate_bias.to(dtype)
    active = silu(hidden)
    logits = linear(active, given.last_gate.to(dtype), _cast(given.last_gate_bias, dtype))
    gates = logits.sigmoid_().unflatten(-1, (rule.heads, 3))
    return hidden, active, gates if len(rule.leading) == 2 else gates[None]


def _gate_weight(given: LayerInputs, rule: _Rule) -> Tensor | None:
    weight = _cast(given.gate_proj_weight, given.x.dtype)
    return None if weight is None else widen(weight, kernel_head_dim(*weight.shape[-1:] * 2))


def run_layer_backward(
    theta: float, given: LayerInputs, options: OpOptions, dout: Tensor, *tensors: Tensor
) -> list[Tensor]:
    """Gradients of the tensors in ``given`` but the last."""
    x, rule, grads = given.x, _Rule.of(theta, given, options), dict[str, Tensor]()
    saved, of_attention = _LayerSaved._make(tensors[:_NUM_SAVED]), tensors[_NUM_SAVED:]
    if given.gate is None:
        saved = saved._replace(hidden=None, active=None, gates=None)
    with torch.cuda.device_of(x), without_autocast(x.device):
        drows = dout.flatten(0, -2)
        grads["out"] = drows.mT @ saved.out.flatten(0, -2)
        if given.out_bias is not None:
            grads["out_bias"] = drows.sum(0)
        dout = (dout @ given.out.to(x.dtype)).unflatten(-1, (rule.heads, rule.head_dim))
        inputs = _attention_inputs(saved, _gate_weight(given, rule))
        dout = rule.kernel_form(dout)
        found = Inputs(*ops.run_attention_backward(inputs, options, dout, *of_attention))
        dhidden = _gates_backward(given, saved, found, grads)
        dproduct = _product_gradient(given, rule, saved, found, dhidden, grads)
        grads["x"] = dproduct @ _joined(given.projections, x.dtype)
        weights = given.projections
        parts = (dproduct.flatten(0, -2).mT @ x.flatten(0, -2)).split(list(map(len, weights)))
        # Copies, because who holds one gradient would hold all; in one launch.
        copies = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
        torch._foreach_copy_(copies, parts)
        grads |= zip(("q", "k", "v", "gate"), copies, strict=False)
    named = zip(_DIFFERENTIABLE, given, strict=False)
    return [ops.owned(grads[name].to(t.dtype), x) for name, t in named if t is not None]


def _gates_backward(
    given: LayerInputs, saved: _LayerSaved, found: Inputs, grads: dict[str, Tensor]
) -> list[Tensor]:
    """The gradient of ``hidden``, if any; puts those of the gates' parameters into ``grads``."""
    if saved.hidden is None:
        if found.gate_proj_weight is not None:
            dim = given.position_k.shape[-1]
            grads["gate_proj_weight"] = found.gate_proj_weight[..., :dim]
        return []
    assert given.last_gate is not None
    assert saved.active is not None
    dlogits = torch.ops.aten.sigmoid_backward(found.gates, saved.gates).flatten(0, 1).flatten(1)
    grads["last_gate"] = dlogits.mT @ saved.active.flatten(0, -2)
    grads["last_gate_bias"] = dlogits.sum(0)
    dactive = (dlogits @ given.last_gate.to(dlogits.dtype)).view(saved.hidden.shape)
    dhidden = torch.ops.aten.silu_backward(dactive, saved.hidden)
    grads["gate_bias"] = dhidden.flatten(0, -2).sum(0)
    return [dhidden]


def _product_gradient(
    given: LayerInputs,
    rule: _Rule,
    saved: _LayerSaved,
    found: Inputs,
    dhidden: list[Tensor],
    grads: dict[str, Tensor],
) -> Tensor:
    """The gradient of the product; puts those of the compressors' parameters into ``grads``."""
    parts = (found.q, found.k, found.v, found.k_cmp, found.v_cmp)
    dq, dk, dv, dk_cmp, dv_cmp = map(rule.layer_form, parts)
    dq, dk = rule.rotate(dq, dk, inverse=True)
    dk_cmp = rule.rotate_blocks(dk_cmp, inverse=True)
    dboth, of_compressors = compress_pair_backward(
        dk_cmp.flatten(0, -3),
        dv_cmp.flatten(0, -3),
        (saved.rows, saved.rows_hidden, saved.rows_active),
        (*rule.leading, 2 * rule.kv_heads, rule.head_dim),
        rule.places,
        given.compressors,
    )
    grads |= zip(_DIFFERENTIABLE[_FIRST_OF_COMPRESSORS:], of_compressors, strict=True)
    dproduct = torch.cat([*(x.flatten(-2) for x in (dq, dk, dv)), *dhidden], -1)
    first, columns = _columns(given)[:2]
    dproduct.narrow(-1, first, columns).add_(dboth.flatten(-2))
    return dproduct


_SCHEMA = f"{schema_of(LayerInputs)}, float theta, {schema_of(OpOptions)}"


def _split(arguments: Sequence) -> tuple[LayerInputs, float, OpOptions]:
    theta = arguments[NUM_INPUTS]
    return LayerInputs(*arguments[:NUM_INPUTS]), theta, OpOptions(*arguments[NUM_INPUTS + 1 :])


@custom_op("plain_layer", f"({_SCHEMA}) -> (Tensor, Tensor[])")
def plain_layer(*arguments):
    """The layer's output and, with ``save``, what its backward needs."""
    given, theta, options = _split(arguments)
    num_keys = given.x.shape[-2]
    found = ops.run_recorded(run_layer, given, options, constants=(theta,), num_keys=num_keys)
    out, *saved = found or run_layer(theta, given, options)
    return out, saved


@plain_layer.register_fake
def _(*arguments):
    given, theta, options = _split(arguments)
    x, rule = given.x, _Rule.of(theta, given, options)
    y = x.new_empty(*rule.leading, given.out.shape[0])
    if not options.save:
        return y, []
    batch = rule.leading if len(rule.leading) == 2 else (1, *rule.leading)
    rows, of_blocks = (2, rule.places.blocks * rule.kv_heads), (batch[0], rule.places.entry_blocks)
    q, k, k_cmp = (
        x.new_empty(*leading, heads, rule.kernel_dim)
        for leading, heads in (
            (batch, rule.heads),
            (batch, rule.kv_heads),
            (of_blocks, rule.kv_heads),
        )
    )
    rows_hidden = x.new_empty(*rows, len(given.first_k))
    saved = _LayerSaved(
        out=x.new_empty(*rule.leading, rule.heads * rule.head_dim),
        rows=x.new_empty(*rows, given.first_k.shape[1]),
        rows_hidden=rows_hidden,
        rows_active=torch.empty_like(rows_hidden),
        hidden=x.new_empty(0),
        active=x.new_empty(0),
        gates=x.new_empty(0),
        q=q,
        k=k,
        v=torch.empty_like(k),
        k_cmp=k_cmp,
        v_cmp=torch.empty_like(k_cmp),
    )
    if given.gate is not None:
        hidden = x.new_empty(*rule.leading, len(given.gate))
        gates = x.new_empty(*batch, rule.heads, 3)
        saved = saved._replace(hidden=hidden, active=torch.empty_like(hidden), gates=gates)
    return y, [*saved, *ops.fake_saved(q, k, options, given=True)]


@custom_op("plain_layer_backward", f"(Tensor dout, {_SCHEMA}, Tensor[] saved) -> Tensor[]")
def plain_layer_backward(dout, *arguments):
    """Gradients of the tensors in :class:`LayerInputs` but the last."""
    *call, saved = arguments
    given, theta, options = _split(call)
    others, num_keys = (dout, *saved), given.x.shape[-2]
    found = ops.run_recorded(
        run_layer_backward, given, options, others, constants=(theta,), num_keys=num_keys
    )
    return found or run_layer_backward(theta, given, options, *others)


@plain_layer_backward.register_fake
def _(dout, *arguments):
    return [x.new_empty(x.shape) for x in arguments[: NUM_INPUTS - 1] if x is not None]


def _setup_context(ctx, inputs, output):
    given, theta, options = _split(inputs)
    tensors, ctx.options = ops.split_saved(options, output[1])
    ctx.save_for_backward(*given, *tensors)
    ctx.theta = theta


def _backward(ctx, dout, _):
    tensors = ctx.saved_tensors
    given, options, saved = tensors[:NUM_INPUTS], *ops.join_saved(ctx.options, tensors[NUM_INPUTS:])
    found = iter(plain_layer_backward(dout.contiguous(), *given, ctx.theta, *options, saved))
    grads = [None if x is None else next(found) for x in given[:-1]]
    return *grads, *(None,) * (2 + len(OpOptions._fields))


plain_layer.register_autograd(_backward, setup_context=_setup_context)
