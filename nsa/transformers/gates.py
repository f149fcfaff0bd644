"""Models whose attention modules learn gates from the queries."""

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nsa.transformers.function import GATES
from nsa.validation import UnsupportedError


@cache
def with_gates(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class of models like ``model_class`` whose attention modules learn gates from the queries.

    Each attention module gets a parameter ``nsa_gate_proj_weight (H, 3, D)``, the
    ``gate_proj_weight`` of :func:`nsa.forward`, which is saved and loaded with the others. A
    checkpoint without gates loads too: they are initialised normal with std 0.02, so that all start
    near 1/2. In models of other classes each gate is 1/3.

        model = nsa.transformers.with_gates(LlamaForCausalLM).from_pretrained(path, ...)
    """

    class Gated(model_class):
        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            modules = [x for x in self.modules() if _is_attention(x)]
            if not modules:
                raise UnsupportedError(f"{model_class.__name__} has no attention modules to gate")
            for module in modules:
                shape = module.config.num_attention_heads, 3, module.head_dim
                module.register_parameter(GATES, nn.Parameter(torch.empty(shape)))
            _initialise_gates(self)

        def initialize_weights(self):
            # transformers calls it for what a checkpoint lacks, and marks what it has.
            super().initialize_weights()
            _initialise_gates(self)

        def __reduce_ex__(self, protocol):
            # pickle looks for a class by its name, and would not find this one.
            _, _, *state = super().__reduce_ex__(protocol)
            return _without_state, (model_class,), *state

    # The name is saved in the configuration, where other code finds the original class.
    Gated.__name__, Gated.__qualname__ = model_class.__name__, f"with_gates({model_class.__name__})"
    Gated.__doc__ = model_class.__doc__
    return Gated


def _without_state(model_class: Any) -> PreTrainedModel:
    return object.__new__(with_gates(model_class))


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "num_key_value_groups") and hasattr(module, "head_dim")


def _initialise_gates(model: nn.Module):
    for module in model.modules():
        weight = module._parameters.get(GATES)
        if weight is not None and not getattr(weight, "_is_hf_initialized", False):
            nn.init.normal_(weight, std=0.02)
