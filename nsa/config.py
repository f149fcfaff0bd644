"""NSAConfig: the static settings of Native Sparse Attention, checked once at construction."""

import json
import math
from dataclasses import InitVar, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

_CHOICES = {
    "selection": ("token", "tile"),
    "tile_summary": ("mean", "first"),
    "compressed_visibility": ("complete", "started"),
}
_NON_NEGATIVE = ("num_initial_blocks", "num_local_blocks")
_OPTIONAL = ("num_cmp_selected_blocks",)
_FOLLOWERS = ("compress_stride", "select_block_size")
# Kernels and index arithmetic use these sizes, so they have a maximum. Counts and the window have
# none, because the length of the sequence limits them.
_SIZES = ("compress_block_size", *_FOLLOWERS, "q_tile_size", "cmp_group_size")
_MAX_SIZE = 2**31 - 1
# Past this range a scale is 0 or infinite in float32, and outputs are NaN.
_SCALES = (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)


class _Followed(int):
    """A default that follows ``compress_block_size``; ``dataclasses.replace`` lets it follow again.

    Each instance is its own object, unlike a small int, so a caller's int is never mistaken for
    one. Copies, including those of ``dataclasses.asdict``, are plain ints.
    """

    def __deepcopy__(self, _) -> int:
        return int(self)


# The default of a follower in the signature. In every instance the field is an int.
_FOLLOW: Any = None

# Lets a checkpoint that holds such a field load with weights_only=True.
torch.serialization.add_safe_globals([_Followed])


@dataclass(frozen=True)
class NSAConfig:
    """Block sizes, counts and rules of one Native Sparse Attention layer. Sizes are in tokens.

    ``NSAConfig()`` selects per tile of 256 queries with blocks of 64 tokens, for long context;
    :meth:`paper` is the configuration of https://arxiv.org/abs/2502.11089, section 4.1. Both are
    strictly causal.

    Args:
        selection: ``"token"`` selects per token and KV head (the paper, strictly causal);
            ``"tile"`` selects per tile of ``q_tile_size`` queries and per query head.
        compress_block_size: tokens ``l`` averaged into one compressed token.
        compress_stride: tokens ``d`` between the starts of compressed blocks, default ``l``.
            It must divide ``l`` and ``l'``, and be ``l`` in tile mode.
        select_block_size: tokens ``l'`` of a selection block, default ``l``. In tile mode a
            multiple of ``l``.
        num_selected_blocks: blocks ``n`` that a query (or tile) attends, forced ones included.
            In a sequence with fewer blocks, a query attends all that it may.
            :func:`nsa.select_blocks` limits ``n``, because its rows have ``n`` slots.
        num_initial_blocks: blocks at the start of the sequence that are always selected.
        num_local_blocks: blocks up to the query's own that are always selected. In tile mode they
            end at the block of position ``q_tile_size * (u + 1) - 1``, the end of tile ``u``, even
            if the sequence ends earlier. A forced block past the end of the sequence takes one of
            the ``n`` slots and adds no keys.
        window_size: keys ``w`` of the sliding window, the query's own included. A window longer
            than the sequence covers all of it.
        q_tile_size: queries that share one selection in tile mode.
        tile_summary: ``"first"`` scores a tile by its first query and is strictly causal.
            ``"mean"`` scores it by the mean of its queries, so that routing (not values) sees up
            to ``q_tile_size - 1`` tokens ahead.
        compressed_visibility: ``"complete"`` lets query ``t`` see compressed blocks that end at or
            before ``t``. ``"started"`` lets it see blocks that start at or before ``t``. This
            leaks up to ``l - 1`` future tokens through the mean; it exists only to reproduce
            published numbers.
        num_cmp_selected_blocks: groups ``m`` of compressed tokens that a tile attends in the
            compressed branch (tile mode); ``None`` attends all.
        cmp_group_size: compressed tokens in such a group.
        causal: whether a query sees only tokens at or before it.
        scale: factor on the attention logits, default ``1 / sqrt(D)``; in the range of float32.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or fields contradict each other. Sizes are at most
            ``2**31 - 1``; counts and ``window_size`` have no largest value.
    """

    selection: str = "tile"
    compress_block_size: int = 64
    compress_stride: int = _FOLLOW
    select_block_size: int = _FOLLOW
    num_selected_blocks: int = 16
    num_initial_blocks: int = 0
    num_local_blocks: int = 0
    window_size: int = 512
    q_tile_size: int = 256
    tile_summary: str = "first"
    compressed_visibility: str = "complete"
    num_cmp_selected_blocks: int | None = None
    cmp_group_size: int = 128
    causal: bool = True
    scale: float | None = None
    # Only dataclasses.replace passes this: the defaults of the configuration that it starts from.
    _followed: InitVar[tuple[_Followed, ...]] = field(default=(), kw_only=True)

    if TYPE_CHECKING:
        # These are not fields. `encoded` is the form that custom ops take. `plain` is an equal
        # configuration of plain ints, which torch.compile needs; None if this one is plain.
        @property
        def encoded(self) -> str: ...

        @property
        def plain(self) -> "NSAConfig | None": ...

    def __post_init__(self, _followed):
        self._check_fields()
        followed = []
        for name in _FOLLOWERS:
            value = getattr(self, name)
            if value is None or any(value is default for default in _followed):
                followed.append(value := _Followed(self.compress_block_size))
            else:
                value = int(value)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_followed", tuple(followed))
        if self.scale is not None:
            # One form for each value, so that equal configurations have equal hashes.
            object.__setattr__(self, "scale", float(self.scale))
        self._check_relations()
        object.__setattr__(self, "encoded", json.dumps(asdict(self)))
        object.__setattr__(self, "plain", self.decode(self.encoded) if followed else None)

    def __deepcopy__(self, _) -> "NSAConfig":
        return self

    def __reduce__(self):
        values = (getattr(self, known.name) for known in fields(self))
        return type(self), tuple(None if isinstance(x, _Followed) else x for x in values)

    def __hash__(self):
        # A string caches its hash. A hash of all fields would be computed in each look-up.
        return hash(self.encoded)

    @classmethod
    def decode(cls, encoded: str) -> "NSAConfig":
        """Rebuild a configuration from its ``encoded``."""
        return cls(**json.loads(encoded))

    @classmethod
    def paper(cls, **overrides) -> "NSAConfig":
        """The paper's configuration (section 4.1); keyword arguments replace single fields."""
        settings: dict[str, Any] = dict(
            selection="token",
            compress_block_size=32,
            compress_stride=16,
            select_block_size=64,
            num_selected_blocks=16,
            num_initial_blocks=1,
            num_local_blocks=2,
            window_size=512,
        )
        return cls(**(settings | overrides))

    @classmethod
    def mslk(cls, **overrides) -> "NSAConfig":
        """The tile-mode system of MSLK pull request 296 as published, for comparison.

        It sees ahead: ``tile_summary="mean"`` lets routing see up to ``q_tile_size - 1`` later
        tokens, and ``compressed_visibility="started"`` leaks up to ``l - 1`` later tokens through
        the mean. Keyword arguments replace single fields.
        """
        leaks: dict[str, Any] = dict(tile_summary="mean", compressed_visibility="started")
        return cls(**(leaks | overrides))

    def softmax_scale(self, head_dim: int) -> float:
        """The factor on the logits for queries of ``head_dim`` channels."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def _check_fields(self):
        """Check each field by itself, and keep strings and ints as plain ones."""
        for name in (known.name for known in fields(self)):
            value = getattr(self, name)
            if name in _CHOICES:
                if not isinstance(value, str) or value not in _CHOICES[name]:
                    raise ValueError(f"{name} must be one of {_CHOICES[name]}, got {value!r}")
                # The plain string, because a checkpoint with an enum's member needs the enum.
                plain = _CHOICES[name][_CHOICES[name].index(value)]
                object.__setattr__(self, name, plain)
            elif name == "causal":
                if not isinstance(value, bool):
                    raise TypeError(f"causal must be a bool, got {value!r}")
            elif name == "scale":
                check_scale(value)
            elif not (value is None and name in _OPTIONAL + _FOLLOWERS):
                check_int(
                    name,
                    value,
                    minimum=0 if name in _NON_NEGATIVE else 1,
                    maximum=_MAX_SIZE if name in _SIZES else None,
                )
                if name not in _FOLLOWERS:
                    object.__setattr__(self, name, int(value))

    def _check_relations(self):
        block, stride, select = (
            self.compress_block_size,
            self.compress_stride,
            self.select_block_size,
        )
        for name, size in (("compress_block_size", block), ("select_block_size", select)):
            if size % stride:
                raise ValueError(
                    f"compress_stride must divide {name}, got compress_stride={stride} and "
                    f"{name}={size}"
                )
        forced = self.num_initial_blocks + self.num_local_blocks
        if self.num_selected_blocks < forced:
            raise ValueError(
                f"num_selected_blocks must be at least num_initial_blocks + num_local_blocks = "
                f"{forced}, got {self.num_selected_blocks}"
            )
        if self.selection == "token":
            if self.num_cmp_selected_blocks is not None:
                raise ValueError(
                    f"num_cmp_selected_blocks must be None with selection='token', got "
                    f"{self.num_cmp_selected_blocks}"
                )
            return
        if stride != block:
            raise ValueError(
                f"compress_stride must equal compress_block_size={block} with selection='tile', "
                f"got {stride}"
            )
        if select % block:
            raise ValueError(
                f"select_block_size must be a multiple of compress_block_size={block} with "
                f"selection='tile', got {select}"
            )


def check_int(name: str, value, minimum: int, maximum: int | None = None):
    """Check that ``value`` is an int in a range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")


def check_scale(value):
    """Check that ``value`` is a factor that float32, in which logits are computed, has; or None."""
    check_positive("scale", value)
    least, largest = _SCALES
    if value is not None and not least <= value <= largest:
        raise ValueError(
            f"scale must lie in [{least:.2e}, {largest:.2e}], the range of float32, got {value!r}"
        )


def check_positive(name: str, value):
    """Check that ``value`` is a finite positive number, or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or None, got {value!r}")
    try:
        valid = math.isfinite(value) and value > 0
    except OverflowError:  # an int past the floats
        valid = False
    if not valid:
        raise ValueError(f"{name} must be finite and positive, got {value!r}")
