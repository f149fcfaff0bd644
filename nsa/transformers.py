"""Native Sparse Attention in models of the transformers library: ``attn_implementation="nsa"``.

    import nsa.transformers

    nsa.transformers.register()
    model = LlamaForCausalLM.from_pretrained(path, attn_implementation="nsa")

It is for models whose attention modules call a function that transformers looks up by name, such as
Llama, Qwen and Mistral. ``model.config.nsa`` has the fields of :class:`nsa.NSAConfig` as a dict,
which ``save_pretrained`` saves; without it the default configuration holds. Written for
transformers 5.24, which alone this module imports besides torch and nsa.

There is no KV cache yet: a call with keys of earlier calls raises :class:`nsa.UnsupportedError`.
"""

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from nsa import dispatch
from nsa.config import NSAConfig
from nsa.packing import Packing
from nsa.validation import UnsupportedError

NAME = "nsa"
GATES = "nsa_gate_proj_weight"
_NO_CACHE = "nsa has no KV cache in transformers yet: pass use_cache=False"


def register():
    """Make ``attn_implementation="nsa"`` known to transformers. More calls change nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, find_sequences)


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

    # The name is saved in the configuration, where other code finds the original class.
    Gated.__name__, Gated.__qualname__ = model_class.__name__, f"with_gates({model_class.__name__})"
    Gated.__doc__ = model_class.__doc__
    return Gated


class Sequences:
    """What the layers of one call of a model know of its sequences; transformers hands it on.

    It stands where other attention functions get a mask. The first layer locates the sequences,
    for which the host reads once, and the others take its result.

    Args:
        padding: bool ``(B, N)``, whether a token is one; None if all are.
        packed: whether a mask hides a token from the next one, as between packed sequences.
    """

    def __init__(self, padding: Tensor | None = None, packed: bool = False):
        self.padding, self.packed = padding, packed
        self.index: Tensor | None = None
        self.packing: Packing | None = None
        self._located = False

    def locate(self, q: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None):
        """Set ``packing``, and ``index``, the tokens that are in it; None if these are all.

        Args:
            q: ``(B, N, H, D)``.
            position_ids: ``(B, N)`` or ``(1, N)``; a sequence ends where they do not go on by 1.
            cu_seqlens: int32 boundaries in the ``B * N`` tokens, where the caller knows them.
        """
        if self._located:
            return
        self._located = True
        batch, length = q.shape[:2]
        if cu_seqlens is not None:
            self.packing = Packing(cu_seqlens.to(device=q.device, dtype=torch.int32))
        elif self.padding is not None:
            self.index = self.padding.flatten().nonzero()[:, 0]
            self.packing = Packing(self._bounds_without_padding(position_ids))
        elif position_ids is not None and position_ids.ndim == 2:
            # The first token of a row starts a sequence: its difference is 0.
            starts = position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1
            starts = starts.expand(batch, length).flatten()
            if int(starts.sum()) > batch:
                ends = starts.new_ones(1).nonzero() + starts.numel()
                bounds = torch.cat((starts.nonzero(), ends))[:, 0]
                self.packing = Packing(bounds.int())
        if self.packed and self.packing is None:
            raise UnsupportedError(
                "the mask hides tokens from the next ones, and no position_ids (B, N) say why: nsa "
                "takes padding masks and packed position_ids"
            )

    def _bounds_without_padding(self, position_ids: Tensor | None) -> Tensor:
        """Boundaries of the tokens in ``index``: of rows, and where positions do not grow."""
        assert self.padding is not None
        assert self.index is not None
        lengths = self.padding.sum(1)
        bounds = pad(lengths.cumsum(0), (1, 0))
        if position_ids is None or position_ids.ndim != 2:
            return bounds.int()
        kept = position_ids.expand(self.padding.shape).flatten()[self.index]
        # Row starts are in both; an empty row's is there twice.
        starts = (kept.diff() <= 0).nonzero()[:, 0] + 1
        return torch.cat((bounds, starts)).unique().int() if len(starts) else bounds.int()


_REFUSED = ("block_indices", "indices", "position_bias", "sinks")
"""Arguments of some models' attention that would change the result."""


def find_sequences(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    device: torch.device | None = None,
    **_,
) -> Sequences:
    """The :class:`Sequences` of a call, for the arguments that transformers makes masks of.

    Raises:
        UnsupportedError: keys of earlier calls are in a cache, or the mask is more than causal,
            padding and packed sequences.
    """
    if kv_length != q_length or kv_offset:
        raise UnsupportedError(f"{kv_length} keys for {q_length} queries: {_NO_CACHE}")
    if local_size is not None:
        raise UnsupportedError(_window_message(local_size))
    packed = ahead = False
    if mask_function is not None and not allow_is_causal_skip and q_length > 1:
        # The mask is more than causal, or transformers could not tell because it is compiled.
        first = torch.arange(q_length - 1, device=device)[None]
        entry = torch.arange(batch_size, device=device)[:, None]
        ahead = bool(mask_function(entry, 0, first, first + 1).any())
        packed = not bool(mask_function(entry, 0, first + 1, first).all())
    if use_vmap or ahead:
        raise UnsupportedError(
            "the mask of this model is more than causal, padding and packed sequences, which nsa "
            "cannot do: use another attn_implementation"
        )
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    return Sequences(attention_mask, packed)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sequences | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function of ``attn_implementation="nsa"``, in transformers' form.

    Args:
        module: the attention module; ``module.config.nsa`` has the configuration.
        query: ``(B, H, N, D)``.
        key: ``(B, H_kv, N, D)``.
        value: ``(B, H_kv, N, Dv)``.
        attention_mask: what :func:`find_sequences` returned, or None for a batch without padding.
        dropout, sliding_window, softcap, s_aux: must be 0 or None.
        scaling: factor on the logits.
        is_causal: by default that of the module; as the configuration is.
        position_ids, cu_seq_lens_q: say where packed sequences end.

    Returns:
        ``(B, N, H, Dv)`` and None, as there are no weights to return. Padding gets 0.

    Raises:
        TypeError, ValueError: the configuration is wrong; the message names the field.
        UnsupportedError: something is asked that nsa does not do; the message names it.
    """
    config = _nsa_config(module, scaling)
    if sliding_window is not None:
        raise UnsupportedError(_window_message(sliding_window))
    for name, given in (
        ("dropout", dropout > 0),
        ("softcap", softcap is not None),
        ("s_aux", s_aux is not None),
        *((name, kwargs.get(name) is not None) for name in _REFUSED),
        ("output_attentions", kwargs.get("output_attentions")),
    ):
        if given:
            raise UnsupportedError(f"attn_implementation='nsa' has no {name}: leave it out")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal != config.causal:
        raise UnsupportedError(f"causal in config.nsa must be that of the model, {causal}")
    if query.shape[2] != key.shape[2]:
        raise UnsupportedError(f"{key.shape[2]} keys for {query.shape[2]} queries: {_NO_CACHE}")
    if not isinstance(attention_mask, Sequences | None):
        raise UnsupportedError(
            "attention_mask must be a padding mask (B, N): nsa takes no mask of queries and keys"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    sequences = Sequences() if attention_mask is None else attention_mask
    sequences.locate(q, position_ids, cu_seq_lens_q)
    return _attend(q, k, v, config, getattr(module, GATES, None), sequences), None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, config: NSAConfig, gates: Tensor | None, sequences: Sequences
) -> Tensor:
    """:func:`nsa.forward` on the tokens that are no padding, ``(B, N, H, Dv)``."""
    gates = None if gates is None else gates.to(q.dtype)
    if sequences.packing is None:
        return dispatch.forward(q, k, v, config=config, gate_proj_weight=gates)
    index, shape = sequences.index, (*q.shape[:-1], v.shape[-1])
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if index is not None:
        q, k, v = (x[index] for x in (q, k, v))
    out = dispatch.forward(
        q, k, v, config=config, gate_proj_weight=gates, cu_seqlens=sequences.packing
    )
    if index is not None:
        out = out.new_zeros(shape[0] * shape[1], *shape[2:]).index_copy(0, index, out)
    return out.view(shape)


def _window_message(size: int) -> str:
    return (
        f"sliding_window must be None with attn_implementation='nsa', got {size}: the window is "
        "window_size of config.nsa"
    )


def _nsa_config(module: nn.Module, scaling: float | None) -> NSAConfig:
    fields = getattr(module.config, NAME, None)
    if fields is None:
        fields = {}
    if not isinstance(fields, dict):
        raise TypeError(
            f"config.nsa must be a dict of the fields of NSAConfig, got {type(fields).__name__}; "
            "dataclasses.asdict makes one"
        )
    return _kept_config(tuple(sorted(fields.items())), scaling)


@torch.compiler.assume_constant_result
def _kept_config(fields: tuple[tuple[str, Hashable], ...], scaling: float | None) -> NSAConfig:
    return _make_config(fields, scaling)


@lru_cache(maxsize=64)
def _make_config(fields: tuple[tuple[str, Hashable], ...], scaling: float | None) -> NSAConfig:
    given: dict[str, Any] = dict(fields)
    own = given.get("scale")
    if own is not None and scaling is not None and own != scaling:
        raise ValueError(f"scale in config.nsa must be that of the model, {scaling}, got {own}")
    return NSAConfig(**(given | {"scale": scaling if own is None else own}))


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "num_key_value_groups") and hasattr(module, "head_dim")


def _initialise_gates(model: nn.Module):
    for module in model.modules():
        weight = module._parameters.get(GATES)
        if weight is not None and not getattr(weight, "_is_hf_initialized", False):
            nn.init.normal_(weight, std=0.02)
