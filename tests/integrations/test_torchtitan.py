"""torchtitan's inner attention equals ``nsa.forward``, with stand-ins for its own objects."""

import pickle
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

import nsa
from nsa.integrations.torchtitan import InnerAttention
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.adapter_cases import CONFIGS, assert_same, each_mode

B, L, H, H_KV, D = 2, 130, 6, 2, 16


class VarlenMetadata(NamedTuple):
    cu_seq_q: torch.Tensor
    cu_seq_k: torch.Tensor
    max_q: int
    max_k: int


def documents(lengths: list[int]) -> VarlenMetadata:
    """As ``create_varlen_metadata_for_document`` makes it: boundaries in the flattened batch."""
    bounds = make_cu_seqlens(lengths)
    return VarlenMetadata(bounds, bounds, max(lengths), max(lengths))


def draw() -> tuple[torch.Tensor, ...]:
    return make_inputs((B, L), H, H_KV, D, 24, dtype=torch.float64, requires_grad=True)


@each_mode
@pytest.mark.parametrize("gate", ["q", None])
def test_a_batch_equals_forward(config, gate):
    attention = InnerAttention(config, num_heads=H, head_dim=D, gate=gate, dtype=torch.float64)
    q, k, v = draw()
    out = attention(q, k, v, scale=D**-0.5, enable_gqa=True)
    expected = nsa.forward(q, k, v, config=config, gate_proj_weight=attention.gate_proj_weight)
    assert_same(out, expected, q, k, v, *attention.parameters())
    assert len(list(attention.parameters())) == (1 if gate else 0)


@each_mode
def test_documents_equal_forward_of_each(config):
    lengths = [100, 30, 1, 64, 65]
    q, k, v = draw()
    out = InnerAttention(config)(q, k, v, attention_masks=documents(lengths))
    assert out.shape == (B, L, H, 24)
    parts = zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True)
    alone = [nsa.forward(*(x[None] for x in part), config=config)[0] for part in parts]
    expected = torch.cat(alone).view_as(out)
    assert_same(out, expected, q, k, v)


def test_equal_boundaries_of_keys_are_the_same_and_others_are_not():
    q, k, v = draw()
    given = documents([100, 160])
    attention = InnerAttention(CONFIGS["token"])
    out = attention(q, k, v, attention_masks=given)
    copy = given._replace(cu_seq_k=given.cu_seq_q.clone())
    assert torch.equal(attention(q, k, v, attention_masks=copy), out)
    for other in ([101, 159], [100, 100, 60]):
        wrong = given._replace(cu_seq_k=make_cu_seqlens(other))
        with pytest.raises(nsa.UnsupportedError, match="cu_seq_k must be the tensor cu_seq_q"):
            attention(q, k, v, attention_masks=wrong)


def test_the_configuration_builds_the_module():
    config = InnerAttention.Config(config=CONFIGS["token"], num_heads=H, head_dim=D, gate="q")
    attention = pickle.loads(pickle.dumps(config)).build()
    assert attention.nsa_config == CONFIGS["token"]
    assert attention.gate_proj_weight.shape == (H, 3, D)
    assert replace(config, gate=None, num_heads=None).build().gate_proj_weight is None


def test_parameters_made_on_meta_can_be_initialised():
    attention = InnerAttention(num_heads=H, head_dim=D, gate="q", device="meta")
    attention = attention.to_empty(device="cpu")
    with torch.no_grad():
        attention.gate_proj_weight.fill_(torch.nan)
    attention.reset_parameters()
    assert 0.01 < attention.gate_proj_weight.std() < 0.03


def test_what_cannot_be_done_is_refused():
    q, k, v = draw()
    attention = InnerAttention(CONFIGS["token"])
    with pytest.raises(nsa.UnsupportedError, match="out_transform must be None"):
        attention(q, k, v, out_transform=lambda out, lse: out)
    with pytest.raises(nsa.UnsupportedError, match="must be a VarlenMetadata or None, got dict"):
        attention(q, k, v, attention_masks={})
    with pytest.raises(ValueError, match=r"scale must be None or that .* 0\.25, got 0\.3"):
        attention(q, k, v, scale=0.3)
    with pytest.raises(TypeError, match="scale must be a float or None, got 'a'"):
        attention(q, k, v, scale="a")
    scaled = InnerAttention(replace(CONFIGS["token"], scale=0.3))
    assert scaled(q, k, v, scale=0.3).isfinite().all()
    with pytest.raises(TypeError, match="num_heads must be an int, got None"):
        InnerAttention(gate="q")
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        InnerAttention(gate="q", num_heads=2, head_dim=0)
    with pytest.raises(TypeError, match="dtype must be one of"):
        InnerAttention(CONFIGS["token"], dtype=torch.int32)
    with pytest.raises(ValueError, match="gate must be one of"):
        InnerAttention(gate="hidden")
    with pytest.raises(ValueError, match="backend must be one of"):
        InnerAttention(backend="flash")
