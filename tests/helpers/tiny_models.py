"""Tiny random models of the transformers library, from configs, with ``attn_implementation="nsa"``.

Importing this skips the tests of a module where transformers is not installed, or fails in CI.
"""

from dataclasses import asdict

import torch

from tests.helpers.requirements import import_transformers
from tests.helpers.small_configs import SMALL

nsa_transformers = import_transformers()

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

nsa_transformers.register()

VOCABULARY, LENGTH = 50, 60
CONFIGS = {name: SMALL[name] for name in ("token", "tile")}
MODELS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
}


def model_config(kind: str = "llama", fields: dict | None = None, **changes):
    """A configuration of two layers; ``fields`` are those of :class:`nsa.NSAConfig`."""
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    if kind == "mistral":
        sizes["sliding_window"] = None
    fields = asdict(CONFIGS["token"]) if fields is None else fields
    return MODELS[kind](**(sizes | changes), nsa=fields, attn_implementation="nsa")


def make(config, factory=AutoModelForCausalLM.from_config):
    """The model in float64, its weights spread so that a wrong attention shows in the logits."""
    config.initializer_range = 0.3
    return factory(config).double().eval()


def tokens(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length))


def logits(model, ids, **arguments):
    """Those of a call without a cache."""
    return model(ids, use_cache=False, **arguments).logits
