"""``attn_implementation="nsa"``: tiny random models of the transformers library, from configs."""

import pickle
from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch

import nsa
from tests.helpers.tiny_models import (
    CONFIGS,
    LENGTH,
    MODELS,
    VOCABULARY,
    logits,
    make,
    model_config,
    nsa_transformers,
    tokens,
)

# isort: split
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nsa.transformers import sequences

each_mode = pytest.mark.parametrize("name", CONFIGS)


def gradients(out, model):
    weights = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)
    return torch.autograd.grad((out * weights).sum(), tuple(model.parameters()))


@pytest.mark.parametrize("gated", [False, True], ids=["thirds", "gates"])
@each_mode
def test_a_layer_equals_forward_by_hand(name, gated):
    config = model_config(fields=asdict(CONFIGS[name]))
    model_class = nsa_transformers.with_gates(LlamaForCausalLM) if gated else LlamaForCausalLM
    model = make(config, model_class)
    layer = model.model.layers[0].self_attn
    x = torch.randn(2, LENGTH, 64, dtype=torch.float64, requires_grad=True)
    angles = model.model.rotary_emb(x, torch.arange(LENGTH)[None])
    out, weights = layer(x, position_embeddings=angles)
    assert weights is None
    q, k, v = (
        project(x).unflatten(-1, (-1, 16)).transpose(1, 2)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *angles)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    gates = layer.nsa_gate_proj_weight if gated else None
    expected = layer.o_proj(
        nsa.forward(q, k, v, config=CONFIGS[name], gate_proj_weight=gates).flatten(2)
    )
    torch.testing.assert_close(out, expected)
    leaves = (x, *layer.parameters())
    assert len(leaves) == 5 + gated
    for found, wanted in zip(
        torch.autograd.grad(out.square().sum(), leaves, retain_graph=True),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", MODELS)
def test_padding_on_both_sides_changes_no_token(kind):
    model, ids = make(model_config(kind)), tokens(3)
    left, right = 13, 21
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    mask[1, -right:] = 0
    # As generate() counts; rotations by other positions differ in float32.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = logits(model, ids, attention_mask=mask, position_ids=positions)
    alone = logits(model, ids[:1, left:]), logits(model, ids[1:2, :-right]), logits(model, ids[2:])
    for found, expected in zip((out[0, left:], out[1, :-right], out[2]), alone, strict=True):
        torch.testing.assert_close(found, expected[0])
    whole = torch.cat((out[0, left:], out[1, :-right], out[2]))
    expected = torch.cat([x[0] for x in alone])
    for own, other in zip(gradients(whole, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(own, other)


@each_mode
def test_packed_position_ids_are_sequences(name):
    model = make(model_config(fields=asdict(CONFIGS[name])))
    ids, lengths = tokens(2), ([25, 1, 34], [60])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    rows = zip(ids, lengths, strict=True)
    alone = [logits(model, part[None])[0] for row, n in rows for part in row.split(n)]
    expected = torch.cat(alone).view(2, LENGTH, VOCABULARY)
    torch.testing.assert_close(logits(model, ids, position_ids=positions), expected)
    # The model makes an empty cache by default, with which transformers looks for no packs.
    torch.testing.assert_close(model(ids, position_ids=positions).logits, expected)
    out = logits(model, ids[:1], position_ids=positions[:1])
    torch.testing.assert_close(out, expected[:1])


def test_boundaries_that_the_caller_knows_are_sequences():
    model, ids = make(model_config()), tokens(1)
    bounds = torch.tensor([0, 25, 26, 60])
    positions = torch.cat([torch.arange(n) for n in (25, 1, 34)])[None]
    out = logits(model, ids, position_ids=positions, cu_seq_lens_q=bounds)
    torch.testing.assert_close(out, logits(model, ids, position_ids=positions))


def test_wrong_boundaries_are_refused():
    model, ids = make(model_config()), tokens(2)
    bounds = torch.tensor([0, LENGTH, 2 * LENGTH])
    for wrong, kind in ((bounds.tolist(), "list"), (bounds.float(), r"torch\.float32")):
        with pytest.raises(TypeError, match=f"cu_seq_lens_q must be an int32 .* got {kind}"):
            logits(model, ids, cu_seq_lens_q=wrong)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with pytest.raises(nsa.UnsupportedError, match="cannot be given with padding"):
        logits(model, ids, attention_mask=mask, cu_seq_lens_q=bounds)


def test_sequences_are_located_once_in_a_call(monkeypatch):
    made = []
    packing = sequences.Packing
    monkeypatch.setattr(sequences, "Packing", lambda *given: made.append(given) or packing(*given))
    model, ids = make(model_config(num_hidden_layers=3)), tokens()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    logits(model, ids, attention_mask=mask)
    assert len(made) == 1
    logits(model, ids)
    assert len(made) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    model, ids = make(model_config()), tokens()
    mask = torch.ones_like(ids)
    mask[1, :9] = 0

    def all_gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        return [x.grad.clone() for x in model.parameters()]

    expected = all_gradients()
    model.train()
    model.activation_checkpointing_enable(dict(use_reentrant=reentrant))
    for found, wanted in zip(all_gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_saved_model_loads_as_it_was(tmp_path):
    model, ids = make(model_config()), tokens()
    model.save_pretrained(tmp_path)
    options = dict(dtype=torch.float64)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="nsa", **options)
    assert nsa.NSAConfig(**loaded.config.nsa) == CONFIGS["token"]
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    switched = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    dense = logits(switched, ids)
    switched.set_attn_implementation("nsa")
    assert torch.equal(logits(switched, ids), logits(model, ids))
    assert (dense - logits(model, ids)).abs().max() > 0.01


def test_gates_are_saved_and_a_model_without_them_loads(tmp_path):
    ids, gated = tokens(), nsa_transformers.with_gates(LlamaForCausalLM)
    make(model_config()).save_pretrained(tmp_path / "without")
    options = dict(attn_implementation="nsa", dtype=torch.float64)
    model = gated.from_pretrained(tmp_path / "without", **options)
    weights = [layer.self_attn.nsa_gate_proj_weight for layer in model.model.layers]
    for weight in weights:
        assert weight.shape == (4, 3, 16)
        assert 0.01 < weight.std() < 0.03
    torch.nn.init.normal_(weights[0])
    model.save_pretrained(tmp_path / "with")
    assert model.config.architectures == ["LlamaForCausalLM"]
    loaded = gated.from_pretrained(tmp_path / "with", **options)
    assert torch.equal(loaded.model.layers[0].self_attn.nsa_gate_proj_weight, weights[0])
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_models_with_gates_are_pickled_and_copied():
    """Under the name of their class pickle finds another one, or none."""
    model, ids = make(model_config(), nsa_transformers.with_gates(LlamaForCausalLM)), tokens()
    for copied in (pickle.loads(pickle.dumps(model)), deepcopy(model)):
        assert type(copied) is type(model)
        assert torch.equal(logits(copied, ids), logits(model, ids))


def test_generation_without_a_cache():
    model, ids = make(model_config()), tokens()
    ids[0, :9] = 0
    mask = (ids != 0).long()
    options = dict(max_new_tokens=4, do_sample=False, use_cache=False)
    out = model.generate(ids, attention_mask=mask, **options)
    for row, start in ((0, 9), (1, 0)):
        alone = ids[row : row + 1, start:]
        for _ in range(4):
            alone = torch.cat((alone, logits(model, alone)[:, -1:].argmax(-1)), 1)
        assert torch.equal(out[row, start:], alone[0])


@pytest.mark.unmeasured
@torch.no_grad()  # with gradients, a graph break makes PyTorch warn of its own doing
def test_a_compiled_model_gives_the_same_logits():
    """transformers then cannot tell packed sequences from others, and hands on a mask of both.

    For others see the test of a compiled model that decodes.
    """
    model, ids = make(model_config(num_hidden_layers=1)), tokens()
    compiled = torch.compile(model, backend="eager")
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]
    torch.testing.assert_close(
        logits(compiled, ids, position_ids=positions), logits(model, ids, position_ids=positions)
    )


def test_without_an_entry_the_default_configuration_holds():
    config, ids = model_config(), tokens()
    expected = make(model_config(fields=asdict(nsa.NSAConfig())))
    del config.nsa
    model = make(config)
    model.load_state_dict(expected.state_dict())
    assert torch.equal(logits(model, ids), logits(expected, ids))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"window": 3}, TypeError, "unexpected keyword argument 'window'"),
        ({"window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
        ({"window_size": 20.0}, TypeError, r"window_size must be an int, got 20\.0"),
        ({"window_size": [20]}, TypeError, r"window_size must be an int, got \[20\]"),
        ({"window_size": torch.tensor(20)}, TypeError, r"values that JSON has.*got tensor\(20\)"),
        ({"scale": 0.3}, ValueError, r"scale in config\.nsa must be that of the model, 0\.25, got"),
        (CONFIGS["token"], TypeError, r"config\.nsa must be a dict .* got NSAConfig"),
        (
            asdict(replace(CONFIGS["token"], causal=False)),
            nsa.UnsupportedError,
            r"causal in config\.nsa must be that of the model, True",
        ),
    ],
    ids=["name", "value", "float", "list", "tensor", "scale", "kind", "causal"],
)
def test_wrong_entries_are_refused(fields, error, message):
    model = make(model_config(fields={}))
    model.config.nsa = {"window_size": 20}  # equal to some wrong ones
    model(tokens())
    model.config.nsa = fields
    with pytest.raises(error, match=message):
        model(tokens())


def test_models_that_ask_for_more_are_refused():
    ids = tokens()
    with pytest.raises(nsa.UnsupportedError, match=r"sliding_window must be None .* got 8"):
        make(model_config("mistral", sliding_window=8))(ids)
    model = make(model_config())
    with pytest.raises(nsa.UnsupportedError, match="must be a padding mask"):
        model(ids, attention_mask=torch.zeros(2, 1, LENGTH, LENGTH))
    layer, x = model.model.layers[0].self_attn, torch.randn(2, 4, LENGTH, 16)
    for name, value in (
        ("dropout", 0.1),
        ("softcap", 30.0),
        ("s_aux", torch.zeros(4)),
        ("output_attentions", True),
    ):
        with pytest.raises(nsa.UnsupportedError, match=f"has no {name}: leave it out"):
            nsa_transformers.attention(layer, x, x, x, None, **{name: value})
    with pytest.raises(nsa.UnsupportedError, match="block_indices are for models whose conf"):
        nsa_transformers.attention(layer, x, x, x, None, block_indices=torch.zeros(2, 2, LENGTH, 1))
    with pytest.raises(nsa.UnsupportedError, match="60 keys for 1 queries"):
        nsa_transformers.attention(layer, x[:, :, -1:], x, x, None)
    with pytest.raises(nsa.UnsupportedError, match="_Bare has no attention modules"):
        nsa_transformers.with_gates(_Bare)(model.config)


class _Bare(LlamaForCausalLM):
    """A model whose attention modules are none that a gate fits."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = torch.nn.ModuleList()


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_mask_for_fewer_tokens_is_named(use_cache):
    model, ids = make(model_config()), tokens()
    with pytest.raises(ValueError, match="attention_mask must"), torch.no_grad():
        model(ids, attention_mask=torch.ones_like(ids)[:, :30], use_cache=use_cache)


def test_models_without_dropout_may_say_none():
    layer, x = make(model_config()).model.layers[0].self_attn, torch.randn(2, 4, LENGTH, 16)
    out, _ = nsa_transformers.attention(layer, x, x[:, :2], x[:, :2], None, dropout=None)
    assert out.isfinite().all()


def test_masks_of_models_with_images_are_refused():
    """Their tokens see later ones; other overlays are refused unread."""

    def image(entry, head, query, key):
        return (query >= key) | (key < 5)

    with pytest.raises(nsa.UnsupportedError, match="more than causal"):
        sequences.find_sequences(2, 9, 9, mask_function=image, allow_is_causal_skip=False)
    with pytest.raises(nsa.UnsupportedError, match="more than causal"):
        sequences.find_sequences(2, 9, 9, use_vmap=True)
    with pytest.raises(nsa.UnsupportedError, match="sliding_window must be None"):
        sequences.find_sequences(2, 9, 9, local_size=4)

    def halves(entry, head, query, key):
        return (query >= key) & (query // 5 == key // 5)

    found = sequences.find_sequences(2, 9, 9, mask_function=halves, allow_is_causal_skip=False)
    with pytest.raises(nsa.UnsupportedError, match="no position_ids"):
        found.locate(torch.zeros(2, 9, 4, 16), None, None)


@pytest.mark.parametrize("name", ["position_bias", "sinks", "indices"])
def test_arguments_that_would_change_the_result_are_refused(name):
    module = make(model_config()).model.layers[0].self_attn
    q = torch.randn(1, 4, 20, 8)
    with pytest.raises(nsa.UnsupportedError, match=f"has no {name}"):
        nsa.transformers.attention(module, q, q, q, None, **{name: torch.zeros(1)})


def test_padding_beside_packed_position_ids():
    """A row with padding must not hide that another row has two sequences."""
    model, ids = make(model_config()), tokens(2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    packed = torch.cat([torch.arange(25), torch.arange(LENGTH - 25)])
    positions = torch.stack([packed, (mask[1].cumsum(0) - 1).clamp(min=0)])
    out = logits(model, ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(out[0, 25:], logits(model, ids[:1, 25:])[0])
    torch.testing.assert_close(out[1, 9:], logits(model, ids[1:, 9:])[0])
