"""Native Sparse Attention in models of the transformers library: ``attn_implementation="nsa"``.

    import nsa.transformers

    nsa.transformers.register()
    model = LlamaForCausalLM.from_pretrained(path, attn_implementation="nsa")

It is for models whose attention modules call a function that transformers looks up by name, such as
Llama, Qwen and Mistral. ``model.config.nsa`` has the fields of :class:`nsa.NSAConfig` as a dict,
which ``save_pretrained`` saves; without it the default configuration holds. Written for
transformers 5.24, which alone this module imports besides torch and nsa.

``generate()`` decodes with a cache that keeps compressed keys, see :class:`CacheLayer`. Models that
choose blocks of keys themselves, such as MiniMax-M3, attend these.
"""

from transformers import AttentionInterface, AttentionMaskInterface, cache_utils

from nsa.transformers.cache_layer import NAME, CacheLayer, layer_types_and_kwargs
from nsa.transformers.function import attention
from nsa.transformers.gates import with_gates
from nsa.transformers.sequences import find_sequences

__all__ = ["CacheLayer", "attention", "register", "with_gates"]


def register():
    """Make ``attn_implementation="nsa"`` known to transformers. More calls change nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, find_sequences)
    cache_utils.get_layer_types_and_kwargs = layer_types_and_kwargs
