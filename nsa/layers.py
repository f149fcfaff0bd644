"""Native Sparse Attention as a ``torch.nn`` module: projections, compressor and gates.

The module adds the parts with weights to :func:`nsa.forward`: the query, key, value and output
projections, the learned compression ``phi`` (Eq. 7 of https://arxiv.org/abs/2502.11089) and the
gate MLP (Eq. 5).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nsa import backends, dispatch
from nsa.boundaries import Boundaries, check_boundaries
from nsa.cache import Cache
from nsa.cached_layer import (
    arguments_of_new_tokens,
    as_candidates,
    as_kept,
    is_first_call,
    one_or_three,
)
from nsa.compressor import PLAIN_TYPES, BlockCompressor, kept_items
from nsa.config import NSAConfig
from nsa.host import needs_gradients
from nsa.layer_checks import check_choice, check_input, check_rope, check_sizes
from nsa.layer_compression import compress_tokens, rotate_heads
from nsa.linears import (
    apply_linear,
    common_dtype,
    make_linear,
    make_mlp,
    to_one_dtype,
)
from nsa.packing import Packing, read_once
from nsa.plain_modules import PlainNames, constant_when_compiled, plain_names
from nsa.precision import autocast_dtype
from nsa.recorded_layer import run_recorded
from nsa.rope import Positions
from nsa.validation import (
    check_config,
    check_flag,
    check_max_workspace_bytes,
    check_new_tensors,
)
from nsa.whole_layer import project_whole, run_whole

LONG_ELEMENTS = 1 << 27
"""Elements of hidden states from which a layer saves less for backward even without ``recompute``.
At 64K tokens of dim 4096 what it computes again takes some 2 % of the time."""

_GATES = ("hidden", "q")
_COMPRESSORS = ("mlp", "mean")
_PARTS = ("_project", "_heads", "_branches", "_rotate_and_compress", "_gates", "_run")


class NativeSparseAttention(nn.Module):
    """Multi-head Native Sparse Attention layer.

    ``y = o_proj(nsa.forward(q, k, v, ...))`` with ``q``, ``k``, ``v`` projected from ``x``.

    Args:
        dim: channels of the hidden states.
        num_heads: query heads ``H``.
        num_kv_heads: KV heads ``H_kv``, a divisor of ``num_heads``.
        config: block sizes and rules; default ``NSAConfig()``.
        head_dim: channels ``D`` of queries and keys, default ``dim / num_heads``.
        value_head_dim: channels ``Dv`` of values, default ``head_dim``.
        rope_theta: base of the rotary embedding of queries and keys; None disables it. Positions
            count from 0 in each sequence.
        separate_kv: whether each branch has its own key and value projection, as in the paper.
        gate: ``"hidden"`` applies a two-layer MLP and a sigmoid to ``x``, with a gate for each head
            and branch, as in the paper. ``"q"`` applies ``gate_proj_weight (H, 3, D)`` to the
            (rotated) query.
        compressor: ``"mlp"`` uses a :class:`BlockCompressor` for keys and one for values. With RoPE
            it compresses unrotated keys and rotates the compressed key to its block's centre,
            position ``j * d + (l - 1) / 2``. ``"mean"`` takes the mean of the (rotated) keys and of
            the values; it has no weights.
        bias: whether the four projections have a bias.
        recompute: save less for backward, which computes cheap parts again: the compressors, the
            gate MLP and the window branch. Eager calls of long inputs (2^27 elements of hidden
            states or more) never save the window branch.
        max_workspace_bytes, backend: as in :func:`nsa.forward`.
        device, dtype: of the parameters; by default torch's defaults.

    Projections are initialised normal with variance ``1 / fan_in``, so queries and keys of
    normalised hidden states have unit variance. The gate's last layer is small (0.02), so all gates
    start near 1/2. Biases are 0. No zero weight keeps another weight's gradient at 0. Each module
    initialises its own parameters: call ``m.reset_parameters()`` of ``layer.modules()``, if any.

    The projections and the linear layers of the MLPs may be wrapped or replaced: FSDP units, LoRA,
    quantised or low-rank modules. Such a module gets the dtype of ``x`` (after autocast, if on) and
    may return another float dtype.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        config: NSAConfig | None = None,
        *,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        rope_theta: float | None = 10000.0,
        separate_kv: bool = False,
        gate: str = "hidden",
        compressor: str = "mlp",
        bias: bool = False,
        recompute: bool = False,
        max_workspace_bytes: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(dim, num_heads, num_kv_heads, head_dim, value_head_dim)
        check_choice("gate", gate, _GATES)
        check_choice("compressor", compressor, _COMPRESSORS)
        check_choice("backend", backend, backends.BACKENDS)
        check_max_workspace_bytes(max_workspace_bytes)
        check_new_tensors(dtype, device)
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        check_config(config)
        self.config = NSAConfig() if config is None else config
        self.head_dim = head_dim or dim // num_heads
        self.value_head_dim = value_head_dim or self.head_dim
        self.rope_theta = check_rope(rope_theta, self.head_dim)
        self.num_kv_branches = 3 if check_flag("separate_kv", separate_kv) else 1
        check_flag("bias", bias)
        self.recompute = check_flag("recompute", recompute)
        self.max_workspace_bytes = max_workspace_bytes
        self.backend = backend
        # nsa.distributed.ContextParallel sets it.
        self.context_parallel: Any = None

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_rows = self.num_kv_branches * num_kv_heads
        self.q_proj = make_linear(dim, num_heads * self.head_dim, bias, **factory)
        self.k_proj = make_linear(dim, kv_rows * self.head_dim, bias, **factory)
        self.v_proj = make_linear(dim, kv_rows * self.value_head_dim, bias, **factory)
        self.o_proj = make_linear(num_heads * self.value_head_dim, dim, bias, **factory)
        self.gate_mlp: nn.Module | None = None
        self.gate_proj_weight: nn.Parameter | None = None
        if gate == "hidden":
            hidden = max(3 * num_heads, dim // 4)
            self.gate_mlp = make_mlp(dim, hidden, 3 * num_heads, last_std=0.02, **factory)
        else:
            weight = torch.empty(num_heads, 3, self.head_dim, **factory)
            self.gate_proj_weight = nn.Parameter(weight)
        self.compress_k: nn.Module | None = None
        self.compress_v: nn.Module | None = None
        if compressor == "mlp":
            block_size = self.config.compress_block_size
            self.compress_k = BlockCompressor(block_size, self.head_dim, **factory)
            self.compress_v = BlockCompressor(block_size, self.value_head_dim, **factory)
        self.reset_parameters()

    def reset_parameters(self):
        """Initialise ``gate_proj_weight``, if any. The layer's modules initialise themselves."""
        if self.gate_proj_weight is not None:
            nn.init.normal_(self.gate_proj_weight, std=0.02)

    def make_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Cache:
        """A :class:`nsa.Cache` for this layer.

        Args:
            batch_size: sequences.
            max_length: tokens that a sequence may have.
            dtype, device: by default those of the projections' weights, as far as these are float
                weights; with autocast on, its dtype.
        """
        check_new_tensors(dtype, device)
        weight = next(self.parameters(), torch.empty(0))
        device = weight.device if device is None else torch.device(device)
        if dtype is None:
            dtype = common_dtype(self.q_proj, self.k_proj, self.v_proj)
            if dtype != torch.float64:  # autocast leaves float64
                dtype = autocast_dtype(device) or dtype
        return Cache(
            self.config,
            batch_size,
            max_length,
            self.num_kv_heads,
            self.head_dim,
            self.value_head_dim,
            separate_kv=self.num_kv_branches == 3,
            dtype=dtype,
            device=device,
            num_heads=self.num_heads,
        )

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | Packing | None = None,
        max_seqlen: int | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            x: hidden states ``(B, N, dim)``, or packed ``(T, dim)`` with ``cu_seqlens``, in the
                dtype of the weights (any float dtype under autocast).
            cu_seqlens: int32 ``(S + 1,)`` boundaries of packed sequences, from 0 to ``T``; or a
                :class:`nsa.Packing` of them, for all layers and steps with these boundaries.
            max_seqlen: an upper bound on the sequence lengths. Without it the host reads a tensor
                of boundaries and waits for a GPU.
            cache: what earlier calls left, see :meth:`make_cache`. ``x`` are then new tokens alone,
                at the positions after those in the cache, which keeps them. There are no
                gradients: call the layer under ``torch.no_grad()``.

        Returns:
            The shape of ``x``.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
            UnsupportedError: ``backend="fused"`` cannot do this.
        """
        if self.context_parallel is not None:
            return self.context_parallel.forward(self, x, cu_seqlens, max_seqlen, cache)
        y = None
        # What a subclass does is not known.
        if cache is None and max_seqlen is None and type(self) is NativeSparseAttention:
            y = run_recorded(self, x, cu_seqlens)
        return self._forward(x, cu_seqlens, max_seqlen, cache) if y is None else y

    def _forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | Packing | None = None,
        max_seqlen: int | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """:meth:`forward`, step by step."""
        cu_seqlens = read_once(cu_seqlens, max_seqlen)
        if cache is None:
            y = run_whole(self, x, cu_seqlens, max_seqlen)
            if y is not None:
                return y
        q, k, v, compressed_kv = self._project(x, cu_seqlens, max_seqlen, cache)
        gates, gate_proj_weight = self._gates(x, q.dtype)
        out = dispatch.forward(
            q,
            k,
            v,
            config=self.config,
            gates=gates,
            gate_proj_weight=gate_proj_weight,
            compressed_kv=compressed_kv,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            cache=cache,
            max_workspace_bytes=self.max_workspace_bytes,
            recompute_window=self.recompute or self.saves_less(x),
            backend=self.backend,
        )
        return apply_linear(self.o_proj, out.flatten(-2), x.dtype)

    @torch.no_grad()
    def select_blocks(
        self,
        x: Tensor,
        cu_seqlens: Tensor | Packing | None = None,
        max_seqlen: int | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The blocks that :meth:`forward` attends for the same arguments. A cache stays as it is.

        Returns:
            int32 indices, in the shapes of :func:`nsa.select_blocks`.
        """
        if self.context_parallel is not None:
            return self.context_parallel.select_blocks(self, x, cu_seqlens, max_seqlen, cache)
        cu_seqlens = read_once(cu_seqlens, max_seqlen)
        whole = project_whole(self, x, cu_seqlens, max_seqlen) if cache is None else None
        if whole is None:
            q, k, _, compressed_kv = self._project(x, cu_seqlens, max_seqlen, cache)
        else:
            q, k, compressed_kv = whole
        return dispatch.select_blocks(
            q,
            k,
            config=self.config,
            compressed_kv=compressed_kv,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            cache=cache,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        gate = "q" if self.gate_mlp is None else "hidden"
        compressor = "mean" if self.compress_k is None else "mlp"
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, value_head_dim={self.value_head_dim}, "
            f"rope_theta={self.rope_theta}, separate_kv={self.num_kv_branches == 3}, "
            f"gate={gate!r}, compressor={compressor!r}, recompute={self.recompute}, "
            f"max_workspace_bytes={self.max_workspace_bytes}, backend={self.backend!r}, "
            f"config={self.config}"
        )

    def _project(
        self,
        x: Tensor,
        cu_seqlens: Tensor | Packing | None,
        max_seqlen: int | None,
        cache: Cache | None = None,
    ):
        """Arguments ``q``, ``k``, ``v`` and ``compressed_kv`` of :func:`nsa.forward`."""
        check_input(self, x, cu_seqlens)
        boundaries = check_boundaries(cu_seqlens, max_seqlen, x, x)
        q, keys, values = self._heads(x)
        # Wrapped linears get the dtype of x.
        dtype = keys[0].dtype if autocast_dtype(x.device) else x.dtype
        if cache is not None and not is_first_call(cache, boundaries):
            return arguments_of_new_tokens(
                q,
                keys,
                values,
                boundaries,
                cache,
                config=self.config,
                compressors=None if self.compress_k is None else (self.compress_k, self.compress_v),
                compressed_dtype=dtype,
                rope_theta=self.rope_theta,
            )
        fused = backends.uses_fused(self.backend, q, values[0], check_config(self.config))
        q, rotated, compressed_kv = self._rotate_and_compress(
            q, keys, values, dtype, boundaries, fused
        )
        if cache is not None and compressed_kv is not None:
            config = check_config(self.config)
            compressed_kv = tuple(
                as_candidates(c, x.shape[-2], boundaries, config) for c in compressed_kv
            )
            rotated = as_kept(rotated, keys[0], cache)
        k, v = one_or_three(rotated), one_or_three(values)
        return q, k, v, compressed_kv

    def _rotate_and_compress(
        self,
        q: Tensor,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        dtype: torch.dtype,
        boundaries: Boundaries | None,
        fused: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        """Rotated queries, rotated keys of each branch, and ``compressed_kv`` of
        :func:`nsa.forward`, for which keys and values are cast to ``dtype``."""
        compressed_kv = None
        if self.compress_k is not None:
            k, v = keys[0].to(dtype), values[0].to(dtype)
            compressed = compress_tokens(self, k, v, boundaries, fused)
            compressed_kv = tuple(c.to(q.dtype) for c in compressed)
        positions = Positions()
        if boundaries is not None:
            bounds, rows = boundaries.cu_seqlens, q.shape[0]
            locate = kept_items(boundaries, "tokens", bounds, rows)
            positions = Positions(bounds=bounds, locate=lambda: locate()[1])
        q, *rotated = rotate_heads([q, *keys], positions, self.rope_theta, fused)
        return q, tuple(rotated), compressed_kv

    def _heads(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Queries ``(..., H, D)``, and keys and values of each branch, or of all; not rotated."""
        q, k, v = to_one_dtype(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        return q, self._branches(k, self.head_dim), self._branches(v, self.value_head_dim)

    def _gates(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Arguments ``gates`` and ``gate_proj_weight`` of :func:`nsa.forward`."""
        if self.gate_mlp is not None:
            return self._run(self.gate_mlp, x).sigmoid().to(dtype).unflatten(
                -1, (self.num_heads, 3)
            ), None
        weight = self.gate_proj_weight
        return None, None if weight is None else weight.to(dtype)

    def _branches(self, x: Tensor, head_dim: int) -> tuple[Tensor, ...]:
        """The keys or values ``(..., H_kv, D)`` of each branch, or of all."""
        if self.num_kv_branches == 1:
            # Not a branch of a stack of one, whose derivative would copy.
            return (x.unflatten(-1, (self.num_kv_heads, head_dim)),)
        shape = (self.num_kv_branches, self.num_kv_heads, head_dim)
        return x.unflatten(-1, shape).unbind(-3)

    def saves_less(self, x: Tensor) -> bool:
        """Whether backward of a call for ``x`` computes cheap parts again without ``recompute``."""
        # torch.compile would guard the length, and chooses itself what it computes again.
        return not torch.compiler.is_compiling() and x.numel() >= LONG_ELEMENTS

    def has_own_parts(self) -> bool:
        """Whether a subclass computes a part of the layer in its own way."""
        # That of FSDP computes none.
        kind, plain = type(self), NativeSparseAttention
        return kind is not plain and any(getattr(kind, x) is not getattr(plain, x) for x in _PARTS)

    @constant_when_compiled
    def plain_names(self) -> PlainNames | None:
        """Which modules the layer has, if all are plain. A compiled call does not look again at
        each of their attributes, some hundred; hooks that are added later are not seen, as in
        PyTorch."""
        return plain_names(self, PLAIN_TYPES)

    def _run(self, module: nn.Module, *arguments) -> Tensor:
        """``module(*arguments)``, with ``recompute`` once more in backward."""
        tensors = (x for x in arguments if isinstance(x, Tensor))
        # A checkpoint refuses inference tensors even if there is no backward.
        if self.recompute and needs_gradients(*tensors, *module.parameters()):
            return checkpoint(module, *arguments, use_reentrant=False)
        return module(*arguments)
