"""Megatron's core attention equals ``nsa.forward``, with stand-ins for its own objects."""

from dataclasses import dataclass, replace
from enum import Enum
from types import SimpleNamespace

import pytest
import torch

import nsa
from nsa.integrations.megatron import CoreAttention
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.adapter_cases import CONFIGS, assert_same, each_mode, gradients

S, B, H, H_KV, D = 130, 2, 6, 2, 16


class AttnMaskType(Enum):
    padding = 1
    causal = 2
    no_mask = 3
    padding_causal = 4
    arbitrary = 5


@dataclass
class PackedSeqParams:
    qkv_format: str | None = "thd"
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_kv: torch.Tensor | None = None
    cu_seqlens_q_padded: torch.Tensor | None = None
    cu_seqlens_kv_padded: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_kv: int | None = None
    local_cp_size: int | None = None


def transformer(**changes) -> SimpleNamespace:
    """The fields of ``TransformerConfig`` that are read."""
    fields = dict(
        attention_dropout=0.0,
        kv_channels=D,
        num_attention_heads=H,
        params_dtype=torch.float64,
        context_parallel_size=1,
        window_size=None,
        softmax_type="vanilla",
    )
    return SimpleNamespace(**(fields | changes))


def make(nsa_config=None, *, mask=AttnMaskType.causal, changes=None, **options) -> CoreAttention:
    """As a Megatron layer makes it, with ``options`` from a ``ModuleSpec``."""
    return CoreAttention(
        config=transformer(**(changes or {})),
        layer_number=1,
        attn_mask_type=mask,
        **(dict(attention_type="self", cp_comm_type=None, pg_collection=None) | options),
        nsa_config=nsa_config,
    )


def packing(lengths: list[int], padded: list[int] | None = None) -> PackedSeqParams:
    bounds = make_cu_seqlens(lengths)
    params = PackedSeqParams(cu_seqlens_q=bounds, cu_seqlens_kv=bounds.clone())
    params.max_seqlen_q = params.max_seqlen_kv = max(lengths)
    if padded:
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = make_cu_seqlens(padded)
    return params


def draw(*leading: int) -> tuple[torch.Tensor, ...]:
    return make_inputs(leading, H, H_KV, D, 24, dtype=torch.float64, requires_grad=True)


@each_mode
@pytest.mark.parametrize("gate", ["q", None])
def test_a_batch_equals_forward(config, gate):
    attention = make(config, gate=gate)
    q, k, v = draw(S, B)
    out = attention(q, k, v, torch.ones(1, 1, S, S, dtype=torch.bool))
    assert out.shape == (S, B, H * 24)
    weight = attention.gate_proj_weight
    swapped = (x.transpose(0, 1) for x in (q, k, v))
    expected = nsa.forward(*swapped, config=config, gate_proj_weight=weight)
    assert_same(out, expected.transpose(0, 1).flatten(2), q, k, v, *attention.parameters())
    assert len(list(attention.parameters())) == (1 if gate else 0)


@each_mode
@pytest.mark.parametrize("mask", [AttnMaskType.causal, AttnMaskType.padding_causal])
def test_packed_sequences_equal_forward(config, mask):
    lengths = [100, 0, 1, 65]
    q, k, v = draw(sum(lengths))
    out = make(config)(q, k, v, None, attn_mask_type=mask, packed_seq_params=packing(lengths))
    assert out.shape == (sum(lengths), H * 24)
    expected = nsa.forward(q, k, v, config=config, cu_seqlens=make_cu_seqlens(lengths))
    assert_same(out, expected.flatten(1), q, k, v)


@each_mode
def test_padding_between_packed_sequences_changes_no_token(config):
    lengths, padded = [100, 3, 65], [112, 16, 80]
    q, k, v = draw(sum(padded))
    real = torch.cat([torch.arange(m) < n for n, m in zip(lengths, padded, strict=True)])
    params = packing(lengths, padded)
    out = make(config)(q, k, v, None, packed_seq_params=params)[real]
    tight = [x[real] for x in (q, k, v)]
    expected = nsa.forward(*tight, config=config, cu_seqlens=make_cu_seqlens(lengths))
    assert_same(out, expected.flatten(1), q, k, v)
    for x in gradients(out, q, k, v):
        assert not x[~real].any()


@pytest.mark.parametrize(
    "config",
    [
        nsa.NSAConfig(tile_summary="mean"),
        nsa.NSAConfig.paper(compressed_visibility="started"),
        nsa.NSAConfig.paper(causal=False),
    ],
    ids=["mean", "started", "not causal"],
)
def test_padding_that_could_be_seen_is_refused(config):
    mask = AttnMaskType.causal if config.causal else AttnMaskType.padding
    q, k, v = draw(16)
    attention = make(config, mask=mask)
    with pytest.raises(nsa.UnsupportedError, match="cu_seqlens_q_padded must be None"):
        attention(q, k, v, None, packed_seq_params=packing([10], [16]))
    assert attention(q, k, v, None, packed_seq_params=packing([16])).isfinite().all()


def test_the_scale_is_that_of_the_layer():
    q, k, v = draw(S, B)
    out = make(CONFIGS["token"], softmax_scale=0.1)(q, k, v, None)
    config = replace(CONFIGS["token"], scale=0.1)
    torch.testing.assert_close(out, make(config)(q, k, v, None))
    assert not torch.allclose(out, make(CONFIGS["token"])(q, k, v, None))


def test_without_causal_order():
    config = nsa.NSAConfig.paper(causal=False, window_size=20)
    q, k, v = draw(S, B)
    out = make(config, mask=AttnMaskType.no_mask)(q, k, v, None)
    expected = nsa.forward(*(x.transpose(0, 1) for x in (q, k, v)), config=config)
    torch.testing.assert_close(out, expected.transpose(0, 1).flatten(2))
    with pytest.raises(nsa.UnsupportedError, match=r"causal=False\), got causal"):
        make(config)(q, k, v, None)
    with pytest.raises(nsa.UnsupportedError, match=r"causal=False\), got None"):
        make(config, mask=None)(q, k, v, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention_type="cross"), "attention_type must be 'self', got 'cross'"),
        (dict(attention_dropout=0.1), r"attention_dropout must be 0, got 0\.1"),
        (dict(changes=dict(attention_dropout=0.1)), r"attention_dropout must be 0, got 0\.1"),
        (dict(changes=dict(context_parallel_size=2)), "context_parallel_size must be 1, got 2"),
        (dict(changes=dict(window_size=(128, 0))), r"use NSAConfig\(window_size=\)"),
        (dict(changes=dict(softmax_type="learnable")), "softmax_type must be 'vanilla'"),
        (
            dict(gate="q", pg_collection=SimpleNamespace(tp=SimpleNamespace(size=lambda: 2))),
            "gate must be None with tensor parallelism, got 'q' and 2 ranks",
        ),
    ],
)
def test_layers_that_cannot_be_made(options, message):
    with pytest.raises(nsa.UnsupportedError, match=message):
        make(**options)


def test_calls_that_cannot_be_made():
    attention = make(CONFIGS["token"])
    q, k, v = draw(32, 1)
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    for arguments, message in (
        (dict(attention_bias=mask), "attention_bias must be None"),
        (dict(attn_mask_type=AttnMaskType.arbitrary), r"causal=True\), got arbitrary"),
        (dict(attn_mask_type=AttnMaskType.no_mask), r"causal=True\), got no_mask"),
        (dict(attn_mask_type=AttnMaskType.padding_causal), "pack the sequences"),
    ):
        with pytest.raises(nsa.UnsupportedError, match=message):
            attention(q, k, v, mask, **arguments)
    for change, message in (
        (dict(qkv_format="sbhd"), "qkv_format must be 'thd', got 'sbhd'"),
        (dict(local_cp_size=2), "local_cp_size must be 1"),
        (dict(cu_seqlens_kv=make_cu_seqlens([16, 16])), "cu_seqlens_kv must be the tensor"),
    ):
        params = packing([32])
        for name, value in change.items():
            setattr(params, name, value)
        with pytest.raises(nsa.UnsupportedError, match=message):
            attention(*(x[:, 0] for x in (q, k, v)), None, packed_seq_params=params)
