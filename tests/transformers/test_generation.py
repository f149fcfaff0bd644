"""``generate()`` with a cache of nsa's layers: token for token what it gives without a cache."""

from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch

import nsa
from nsa.cache.places import block_places
from tests.helpers.small_configs import tile_config, token_config
from tests.helpers.tiny_models import (
    CONFIGS,
    MODELS,
    logits,
    make,
    model_config,
    nsa_transformers,
    tokens,
)

# isort: split
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache

from nsa.transformers import cache_layer

NEW = 9
PROMPT = 30
each_mode = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture
def small_steps(monkeypatch):
    """Caches that grow every few tokens."""
    monkeypatch.setattr(cache_layer, "_LEAST_SPARE", 2)


def prompts(*padding: int, length: int = PROMPT) -> dict[str, torch.Tensor]:
    """A batch of prompts with so much padding on the left of each."""
    mask = torch.ones(len(padding), length, dtype=torch.long)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return dict(input_ids=tokens(len(padding), length) * mask, attention_mask=mask)


def generate(model, given, **options):
    torch.manual_seed(1)
    options = dict(max_new_tokens=NEW, do_sample=False) | options
    return model.generate(**given, output_logits=True, return_dict_in_generate=True, **options)


def assert_same_generation(model, given, **options):
    """With and without a cache; returns the cache."""
    found = generate(model, given, **options)
    options.pop("prefill_chunk_size", None)
    expected = generate(model, given, use_cache=False, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for own, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(own, other)
    assert isinstance(found.cache.layers[0], nsa_transformers.CacheLayer)
    return found.cache


@pytest.mark.parametrize("options", [
    {},
    dict(num_beams=3),
    dict(num_beams=4, num_return_sequences=2, do_sample=True, top_k=0),
    dict(do_sample=True, num_return_sequences=2),
    dict(cache_implementation="static"),
    dict(prefill_chunk_size=7),
], ids=["greedy", "beams", "sampled beams", "sampled", "static", "chunks"])  # fmt: skip
@pytest.mark.parametrize("padding", [(0, 0), (13, 0, 29)], ids=["whole", "padded"])
@each_mode
def test_generation_equals_one_without_a_cache(name, padding, options, small_steps):
    model = make(model_config(fields=asdict(CONFIGS[name])))
    assert_same_generation(model, prompts(*padding), **options)


@each_mode
def test_prompts_padded_on_the_right_go_on_after_the_padding(name):
    """transformers warns, and counts positions from the last padding on."""
    given = {key: x.flip(1) for key, x in prompts(0, 4).items()}
    assert_same_generation(make(model_config(fields=asdict(CONFIGS[name]))), given)


@pytest.mark.parametrize("kind", MODELS)
def test_families_generate_alike(kind):
    assert_same_generation(make(model_config(kind)), prompts(5, 0), num_beams=2)


@pytest.mark.parametrize("fields", [token_config(), tile_config()], ids=["token", "tile"])
def test_the_fused_backend_decodes_what_one_call_attends(fields, fused_on_cpu, small_steps):
    model = make(model_config(fields=asdict(fields), head_dim=32, num_hidden_layers=1))
    given = prompts(0, 101, length=130)
    q, k = (torch.zeros(1, 9, heads, 32).double() for heads in (4, 2))
    assert "backend: fused" in nsa.explain_backend(q, k, k, config=fields)
    found = generate(model, given, max_new_tokens=5)
    mask = torch.nn.functional.pad(given["attention_mask"], (0, 5), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = logits(model, found.sequences, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(torch.stack(found.logits, 1), expected[:, 129:-1].float())


def test_gates_decode():
    model = make(model_config(), nsa_transformers.with_gates(LlamaForCausalLM))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.nsa_gate_proj_weight)
    assert_same_generation(model, prompts(5, 0))


def test_rows_that_end_early_do_not_change_others():
    """Their later tokens are padding that the mask calls tokens, with a cache and without."""
    model = make(model_config())
    given = prompts(4, 0, 9)
    first = generate(model, given).sequences[0, PROMPT + 2]
    assert_same_generation(model, given, eos_token_id=int(first), pad_token_id=0)


@each_mode
def test_assisted_generation_drops_wrong_guesses(name, monkeypatch):
    model = make(model_config(fields=asdict(CONFIGS[name])))
    assistant = make(model_config(num_hidden_layers=1, fields=asdict(CONFIGS[name])))
    assistant.generation_config.num_assistant_tokens = 4
    cropped = []
    crop = cache_layer.CacheLayer.crop
    monkeypatch.setattr(
        cache_layer.CacheLayer, "crop", lambda self, n: (cropped.append(n), crop(self, n))
    )
    given = prompts(0)
    expected = generate(model, given, use_cache=False).sequences
    assert torch.equal(generate(model, given, assistant_model=assistant).sequences, expected)
    assert min(cropped) < 0
    cropped.clear()
    given["input_ids"][0, 20:] = given["input_ids"][0, 5:15]
    expected = generate(model, given, use_cache=False).sequences
    assert torch.equal(generate(model, given, prompt_lookup_num_tokens=4).sequences, expected)
    assert min(cropped) < 0


@each_mode
def test_a_saved_model_goes_on_with_a_conversation(name, tmp_path):
    """A second turn takes the cache of the first."""
    make(model_config(fields=asdict(CONFIGS[name]))).save_pretrained(tmp_path)
    options = dict(attn_implementation="nsa", dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    given = prompts(5, 0)
    first = generate(model, given)
    turn = torch.cat((first.sequences, tokens(2, 7)), 1)
    mask = torch.nn.functional.pad(given["attention_mask"], (0, NEW + 7), value=1)
    given = dict(input_ids=turn, attention_mask=mask)
    expected = generate(model, given, use_cache=False).sequences
    assert torch.equal(generate(model, given, cache=first.cache).sequences, expected)
    assert first.cache.get_seq_length() == PROMPT + 2 * NEW + 7 - 1


@each_mode
@torch.no_grad()
def test_calls_by_hand_give_the_logits_of_one_call(name, small_steps):
    """Any number of new tokens a call, with padding anywhere, also between them."""
    model, ids = make(model_config(fields=asdict(CONFIGS[name]))), tokens(3, 50)
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[1, 30:36] = mask[2, 17:25] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = logits(model, ids, attention_mask=mask, position_ids=positions)
    cache, parts, start = None, [], 0
    for end in (20, 21, 33, 41, 42, 50):
        out = model(
            ids[:, start:end], attention_mask=mask[:, :end],
            position_ids=positions[:, start:end], cache=cache, use_cache=True,
        )  # fmt: skip
        cache, start = out.cache, end
        parts.append(out.logits)
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1])
    assert cache.get_seq_length() == 50
    assert [layer.cache.lengths.tolist() for layer in cache.layers] == [[39, 44, 42]] * 2


def test_a_step_takes_new_keys_alone_and_keeps_compressed_ones(monkeypatch):
    seen = []
    forward = nsa.dispatch.forward

    def record(q, k, v, **given):
        seen.append(k.shape[1])
        return forward(q, k, v, **given)

    monkeypatch.setattr(nsa.dispatch, "forward", record)
    out = generate(make(model_config()), prompts(0, 0))
    assert seen == [PROMPT] * 2 + [1] * 2 * (NEW - 1)
    blocks = nsa.blocks.num_compressed_blocks(PROMPT + NEW - 1, CONFIGS["token"])
    for layer in out.cache.layers:
        places = block_places(layer.cache, torch.zeros(blocks).long(), torch.arange(blocks))
        assert places.read(layer.cache.k_cmp_pages).abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("make_cache", [
    lambda config: DynamicCache(config=config),
    lambda config: StaticCache(config=config, max_cache_len=60),
], ids=["dynamic", "static"])  # fmt: skip
@torch.no_grad()
def test_a_cache_goes_on_where_it_was_copied(make_cache):
    """As for a prompt that several questions follow."""
    model, ids = make(model_config()), tokens(1, 50)
    cache = make_cache(model.config)
    model(ids[:, :40], cache=cache)
    for last in (ids[:, 40:], tokens(1, 10)):
        out = model(last, cache=deepcopy(cache)).logits
        torch.testing.assert_close(out, logits(model, torch.cat((ids[:, :40], last), 1))[:, 40:])


@pytest.mark.unmeasured
@torch.no_grad()
def test_a_compiled_model_decodes():
    model, ids = make(model_config(num_hidden_layers=1)), tokens(2, 40)
    compiled = torch.compile(model, backend="eager")
    cache = compiled(ids[:, :30], use_cache=True).cache
    out = compiled(ids[:, 30:], cache=cache).logits
    torch.testing.assert_close(out, logits(model, ids)[:, 30:])


@each_mode
@torch.no_grad()
def test_rows_of_a_cache_are_repeated_selected_and_dropped(name):
    model, ids = make(model_config(fields=asdict(CONFIGS[name]))), tokens(2, 40)
    cache = model(ids[:, :30], use_cache=True).cache
    with torch.device("meta"):  # a default device of the user's
        cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False, True, True]))
    rows = torch.tensor([0, 1, 1])
    expected = logits(model, ids[rows])
    cache.crop(-1)
    out = model(ids[rows, 29:35], cache=cache)
    torch.testing.assert_close(out.logits, expected[:, 29:35])
    assert cache.batch_size == 3
    assert not cache.is_compileable
    assert cache.is_croppable
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, cache=cache).logits, expected[:2])


@torch.no_grad()
def test_padding_cannot_be_cropped():
    model, given = make(model_config()), prompts(0, 0)
    given["attention_mask"][0, 20:23] = 0
    cache = model(**given, use_cache=True).cache
    cache.crop(0)
    cache.crop(-7)
    assert cache.get_seq_length() == PROMPT - 7
    assert cache.layers[0].cache.lengths.tolist() == [20, 23]
    with pytest.raises(nsa.UnsupportedError, match="0 tokens follow the last padding, got -1"):
        cache.crop(-1)


@torch.no_grad()
def test_what_crop_refuses():
    model, ids = make(model_config()), tokens()
    cache = DynamicCache(config=model.config)
    cache.crop(-3)  # there is nothing to remove yet
    model(ids[:, :9], cache=cache)
    for wrong, error, message in (
        (3, ValueError, "tokens_to_remove must be at most 0, got 3"),
        (-10, ValueError, "tokens_to_remove must be at least -9, got -10"),
        (-1.0, TypeError, "tokens_to_remove must be an int, got -1.0"),
    ):
        with pytest.raises(error, match=message):
            cache.crop(wrong)
    assert cache.get_seq_length() == 9
    cache.crop(-9)
    torch.testing.assert_close(model(ids, cache=cache).logits, logits(model, ids))


def test_what_no_cache_holds_is_attended_in_the_first_call():
    """Models make a cache by default, also in training."""
    ids = tokens()
    model = make(model_config())
    expected = logits(model, ids)
    first = model(ids)
    torch.testing.assert_close(first.logits, expected)
    assert first.logits.requires_grad
    with pytest.raises(nsa.UnsupportedError, match=r"kept of the earlier call.*no gradients; use"):
        model(ids, cache=first.cache)
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache
    with pytest.raises(nsa.UnsupportedError, match="nsa's cache has no gradients; use"):
        model(ids, cache=cache)
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]
    with torch.no_grad():
        cache = model(ids, position_ids=positions).cache
        with pytest.raises(nsa.UnsupportedError, match=r"one sequence for each row.*use_cache=Fal"):
            model(ids, cache=cache)
    ahead = asdict(replace(CONFIGS["tile"], tile_summary="mean"))
    model = make(model_config(fields=ahead))
    generate(model, dict(input_ids=ids), max_new_tokens=1)
    with pytest.raises(nsa.UnsupportedError, match="tile_summary='first', or pass use_cache=False"):
        generate(model, dict(input_ids=ids))


@torch.no_grad()
def test_wrong_calls_with_a_cache_are_refused():
    model, given = make(model_config()), prompts(3, 0)
    cache = model(**given, use_cache=True).cache
    new, mask = tokens(2, 1), torch.ones(2, PROMPT + 1, dtype=torch.long)
    for given_mask in (mask, None):
        with pytest.raises(ValueError, match="attention_mask must mark the padding of earlier"):
            model(new, attention_mask=given_mask, cache=cache)
    mask[0, :2] = 0
    with pytest.raises(ValueError, match=r"must be that of the earlier calls .* in 1 of 2"):
        model(new, attention_mask=mask, cache=cache)
    mask[0, 2] = 0
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 31\), got \(2, 4\)"):
        model(new, attention_mask=mask[:, :4], cache=cache)
    with pytest.raises(nsa.UnsupportedError, match="cu_seq_lens_q cannot be given with keys"):
        model(new, attention_mask=mask, cache=cache, cu_seq_lens_q=torch.tensor([0, 1, 2]))
    plain = DynamicCache()
    model(**given, cache=plain)
    with pytest.raises(nsa.UnsupportedError, match="31 keys for 1 queries: only a cache of nsa"):
        model(new, cache=plain)
    static = StaticCache(config=model.config, max_cache_len=32)
    model(given["input_ids"], cache=static)
    with pytest.raises(ValueError, match=r"max_length of at least 33 .* got 32"):
        model(tokens(2, 3), cache=static)
    with pytest.raises(nsa.UnsupportedError, match="cannot be offloaded"):
        cache.offload(0)
    with pytest.raises(nsa.UnsupportedError, match="cannot be offloaded"):
        cache.layers[1].prefetch()
    with pytest.raises(ValueError, match="native_sparse_attention"):
        generate(model, given, cache_implementation="quantized")
    layer = cache.layers[0]
    with pytest.raises(nsa.UnsupportedError, match="does not show its cache"):
        layer.update(torch.zeros(1), torch.zeros(1))
    model.set_attn_implementation("sdpa")
    with pytest.raises(nsa.UnsupportedError, match="attn_implementation='nsa', got 'sdpa'"):
        model(new, cache=cache)


def test_other_models_get_the_caches_of_transformers():
    config = model_config()
    config._attn_implementation = "sdpa"
    names = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    assert names == ["DynamicLayer"] * 2
    sliding = model_config("mistral", sliding_window=8)
    names = [type(layer).__name__ for layer in DynamicCache(config=sliding).layers]
    assert names == ["DynamicSlidingWindowLayer"] * 2


def test_each_device_of_a_split_model_gets_its_own_rows(monkeypatch):
    """A second device is played by one without values; layers on it must not read the first's."""
    made = []
    packing = nsa_transformers.sequences.Packing

    def record(cu_seqlens):
        made.append(cu_seqlens.device.type)
        return packing(cu_seqlens) if cu_seqlens.device.type == "cpu" else "other"

    monkeypatch.setattr(nsa_transformers.sequences, "Packing", record)
    sequences = nsa_transformers.sequences.Sequences(prompts(3, 0)["attention_mask"].bool())
    q = torch.zeros(2, PROMPT, 4, 16)
    for _ in range(2):
        own = sequences.locate(q, None, None)
        assert own.kept.tolist() == list(range(3, 2 * PROMPT))
        assert own.packing.cu_seqlens.tolist() == [0, PROMPT - 3, 2 * PROMPT - 3]
        other = sequences.locate(q.to("meta"), None, None)
        assert (other.kept.device.type, other.packing) == ("meta", "other")
    assert made == ["cpu", "meta"]
