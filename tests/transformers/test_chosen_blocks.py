"""A tiny random MiniMax-M3, which chooses blocks itself, with nsa and with its eager attention."""

from copy import deepcopy

import pytest
import torch

import nsa
from tests.helpers.tiny_models import VOCABULARY, make, nsa_transformers, tokens

# isort: split
from transformers import (
    DynamicCache,
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    MiniMaxM3VLTextConfig,
    StaticCache,
)
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

LENGTH = 150
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=16,
    dense_intermediate_size=16,
    shared_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rotary_dim=8,
    num_local_experts=2,
    num_experts_per_tok=1,
    index_n_heads=2,
    index_head_dim=16,
    index_block_size=32,
    index_topk_blocks=2,
    layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
# The default one takes no float64.
EAGER_EXPERTS = dict(experts_implementation="eager")


@pytest.fixture
def exact_softmax(monkeypatch):
    """The eager attention's softmax in float64, which it computes in float32."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype: softmax(x, dim))


def make_pair(**changes):
    """One model with nsa, and with its eager attention."""
    config = MiniMaxM3VLTextConfig(**(SIZES | changes), attn_implementation="nsa", **EAGER_EXPERTS)
    model = make(config, MiniMaxM3VLForCausalLM)
    eager = deepcopy(model)
    eager.set_attn_implementation("eager")
    return model, eager


def gradients(loss, model):
    names, leaves = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True))


@pytest.mark.parametrize("padding", [0, 37], ids=["whole", "padded"])
@pytest.mark.parametrize("changes", [
    {},
    dict(index_block_size=64, index_topk_blocks=1),
    dict(index_local_blocks=0, num_attention_heads=6),
    dict(index_topk_blocks=16),
], ids=["32", "64", "no local blocks", "all blocks"])  # fmt: skip
def test_logits_and_gradients_equal_the_eager_path(changes, padding, exact_softmax):
    model, eager = make_pair(**changes)
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, LENGTH - padding :] = 0
    given = dict(attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
    found, expected = model(ids, **given), eager(ids, **given)
    torch.testing.assert_close(found.logits[mask == 1], expected.logits[mask == 1])
    own, other = gradients(found.loss, model), gradients(expected.loss, eager)
    unused = {name for name, grad in other.items() if grad is None}
    assert unused == {name for name in own if ".indexer." in name}
    for name in set(other) - unused:
        torch.testing.assert_close(own[name], other[name])


def test_blocks_of_the_model_count(exact_softmax):
    """Other blocks give other logits: the test above could see a wrong list."""
    model, _ = make_pair()
    ids = tokens(1, LENGTH)
    out = model(ids).logits
    model.model.layers[2].self_attn.indexer.topk_blocks = 1
    assert (model(ids).logits - out).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, dict(num_beams=2), dict(use_cache=False)])
def test_generation_equals_the_eager_path(options, exact_softmax):
    model, eager = make_pair()
    ids = tokens(2, 90)
    options |= dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, **options), eager.generate(ids, **options))


@torch.no_grad()
def test_pieces_with_a_cache_give_the_logits_of_one_call():
    model, _ = make_pair()
    ids, cache = tokens(2, LENGTH), DynamicCache(config=model.config)
    parts = [model(part, cache=cache).logits for part in ids.split((100, 1, 49), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits)


@torch.no_grad()
def test_the_whole_model_takes_nsa_for_its_text(exact_softmax):
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28,
    )  # fmt: skip
    config = MiniMaxM3VLConfig(
        text_config=SIZES | dict(initializer_range=0.3), vision_config=vision,
        projector_hidden_size=16, **EAGER_EXPERTS,
    )  # fmt: skip
    model = MiniMaxM3SparseForConditionalGeneration(config).double().eval()
    ids = tokens(2, LENGTH)
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    model.set_attn_implementation({"text_config": "nsa", "vision_config": "sdpa"})
    torch.testing.assert_close(model(ids).logits, expected)


def test_what_blocks_cannot_do_is_refused():
    model, _ = make_pair()
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :9] = 0
    with pytest.raises(nsa.UnsupportedError, match=r"from the start of a row.*pad on the right"):
        model(ids, attention_mask=mask)
    positions = torch.cat([torch.arange(50), torch.arange(100)])[None]
    with pytest.raises(nsa.UnsupportedError, match="one sequence a row, not packed position_ids"):
        model(ids, position_ids=positions, use_cache=False)
    with pytest.raises(nsa.UnsupportedError, match="200 keys for 150 queries"):
        model(ids, cache=StaticCache(config=model.config, max_cache_len=200))
    small, _ = make_pair(index_block_size=16)
    with pytest.raises(ValueError, match=r"block_size must be one of \(32, 64, 128\), got 16"):
        small(ids)
    assert nsa_transformers.CacheLayer not in {type(x) for x in model(ids).cache.layers}
