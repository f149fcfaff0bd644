"""The cache: pages of keys and values, and what follows from them, for a batch of sequences."""

import torch
from torch import Tensor

from nsa.blocks import Count
from nsa.cache import argument_checks
from nsa.cache.host_copy import HostCopy, PageOrder
from nsa.cache.layout import MAX_GUESSES, CacheLayout, choose_page_size, make_layout
from nsa.cache.reordering import reorder
from nsa.config import NSAConfig
from nsa.host import is_capturing
from nsa.validation import UnsupportedError, check_flag, check_new_tensors, check_size

Pair = tuple[Tensor, Tensor]


class Cache:
    """Keys and values of earlier calls, for :func:`nsa.forward` with ``cache=``.

    ``k`` and ``v`` of such a call are new tokens only. They are appended in place, and the queries
    are theirs. Step by step, the outputs are those of one call over the whole sequence.

    Memory is paged. Token ``p`` of sequence ``b`` lies in page ``page_table[b, p // page_size]`` at
    slot ``p % page_size``. Compressed block ``j`` lies in the page of its last token
    ``e = j * d + l - 1``, at slot ``(e % page_size) // d``; so it depends on no later page. Beside
    the keys and values of the selected branch, the cache keeps ``1/d`` as many for compressed
    blocks. Where each branch has keys of its own, it also keeps the last ``w`` tokens of the window
    branch and the last ``l`` of the compressed one. In tile mode it keeps the lists of the last
    tiles.

    A call on a GPU can be captured in a CUDA graph if it runs kernels for decoding. Do not write to
    the tensors of a cache, except to ``page_table`` of :meth:`from_pages`.

    Args:
        config: the configuration of the calls; ``causal=True``,
            ``compressed_visibility="complete"`` and, in tile mode, ``tile_summary="first"``.
        batch_size: sequences ``B``.
        max_length: tokens that a sequence may have, at most ``2**31 - 1``.
        num_kv_heads: KV heads ``H_kv``.
        head_dim: channels ``D`` of keys.
        value_head_dim: channels ``Dv`` of values, default ``head_dim``.
        separate_kv: whether ``k`` and ``v`` are three tensors, one for each branch. A cache for
            one tensor does not take three.
        dtype, device: of keys and values; by default torch's defaults.
        num_heads: query heads ``H``. Only tile mode needs it, and takes it from the first call if
            it is not given. A CUDA graph needs it given, or a call before the capture.
        page_size: tokens of a page, a multiple of ``l'``; by default what the kernels prefer.

    Attributes:
        lengths: tokens of each sequence, int32 ``(B,)`` on the device.
        overflowed: bool ``()`` on the device: a call or :meth:`truncate` asked for what the cache
            cannot do, where the host could not know. It stays set until :meth:`reset`.
        page_table: int32 ``(B, max_pages)``.
        k_pages, v_pages: ``(pages, page_size, H_kv, D)`` and ``(pages, page_size, H_kv, Dv)``.
        k_cmp_pages, v_cmp_pages: compressed, ``(pages, page_size / d, H_kv, D)`` and so on.
        window_rings, open_rings: keys and values of the window branch, and of the compressed one:
            ``(B, ring, H_kv, D)`` and ``(B, ring, H_kv, Dv)``, token ``p`` at slot ``p % ring``;
            None if all branches share one.
        block_lists, group_lists: selections of the last tiles, int32 ``(B, tile_slots, H, n)`` and
            ``(B, tile_slots, H, m)``, tile ``u`` at slot ``u % tile_slots``; None if not needed.
        floors: int32 ``(B,)``, the shortest lengths that :meth:`truncate` can go back to.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        UnsupportedError: the configuration cannot be decoded step by step.
    """

    def __init__(
        self,
        config: NSAConfig,
        batch_size: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        separate_kv: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        num_heads: int | None = None,
        page_size: int | None = None,
    ):
        config = argument_checks.check_decodable(config)
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        for name, value in (
            ("batch_size", batch_size),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
            ("value_head_dim", value_head_dim),
            ("max_length", max_length),
        ):
            check_size(name, value, argument_checks.MAX_LENGTH)
        check_flag("separate_kv", separate_kv)
        if page_size is None:
            page_size = choose_page_size(config, max_length)
        argument_checks.check_page_size(page_size, config)
        check_new_tensors(dtype, device)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            layout = make_layout(config, max_length, page_size)
            stride = config.compress_stride

            def zeros(rows: int, slots: int, dim: int) -> Tensor:
                return torch.zeros(rows, slots, num_kv_heads, dim, dtype=dtype, device=device)

            def pair(rows: int, slots: int) -> Pair:
                return zeros(rows, slots, head_dim), zeros(rows, slots, value_head_dim)

            num_pages = batch_size * layout.max_pages
            self.k_pages, self.v_pages = pair(num_pages, page_size)
            self.k_cmp_pages, self.v_cmp_pages = pair(num_pages, page_size // stride)
            table = torch.arange(num_pages, dtype=torch.int32, device=device)
            self.page_table = table.view(batch_size, layout.max_pages)
            self.window_rings = self.open_rings = None
            if separate_kv:
                self.window_rings = pair(batch_size, layout.window_ring)
                self.open_rings = pair(batch_size, layout.open_ring)
            lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
            self._set_up(config, layout, max_length, lengths, num_heads, owns_pages=True)

    @classmethod
    def from_pages(
        cls,
        config: NSAConfig,
        *,
        k_pages: Tensor,
        v_pages: Tensor,
        k_cmp_pages: Tensor,
        v_cmp_pages: Tensor,
        page_table: Tensor,
        lengths: Tensor,
        num_heads: int | None = None,
    ) -> "Cache":
        """A cache in the pages of a server, with one ``k`` and ``v`` for all branches.

        Sequences with one prefix may share its full pages: tokens are only written to the page of
        their own position. A sequence needs its pages in the table before the call that appends to
        them; other entries may hold any number.

        Args:
            config: as of :class:`nsa.Cache`.
            k_pages, v_pages: ``(pages, page_size, H_kv, D)`` and ``(pages, page_size, H_kv, Dv)``;
                ``page_size`` is a multiple of ``l'``. They are written in place.
            k_cmp_pages, v_cmp_pages: ``(pages, page_size / d, H_kv, D)`` and so on.
            page_table: int32 ``(B, max_pages)``; aliased, so the server may write to it.
            lengths: int32 ``(B,)``, tokens that the pages hold; copied. Tile mode reads
                them on the host.
            num_heads: as of :class:`nsa.Cache`.
        """
        config = argument_checks.check_decodable(config)
        argument_checks.check_pages(k_pages, v_pages, k_cmp_pages, v_cmp_pages, config)
        argument_checks.check_table(page_table, lengths, k_pages.device)
        page_size, max_pages = k_pages.shape[1], page_table.shape[1]
        argument_checks.check_held(lengths, max_pages * page_size)
        self = cls.__new__(cls)
        self.k_pages, self.v_pages = k_pages, v_pages
        self.k_cmp_pages, self.v_cmp_pages = k_cmp_pages, v_cmp_pages
        self.page_table = page_table
        self.window_rings = self.open_rings = None
        with torch.inference_mode(False):
            max_length = min(max_pages * page_size, argument_checks.MAX_LENGTH)
            layout = make_layout(config, max_length, page_size)
            own = lengths.detach().clone()
            self._set_up(config, layout, max_length, own, num_heads, owns_pages=False)
            if config.selection == "tile":
                # Only tiles that start in later calls have lists.
                argument_checks.check_whole_tiles(own, config)
                self.floors.copy_(own)
        return self

    def _set_up(
        self,
        config: NSAConfig,
        layout: CacheLayout,
        max_length: int,
        lengths: Tensor,
        num_heads: int | None,
        owns_pages: bool,
    ):
        self.config, self.layout, self.max_length = config, layout, max_length
        self.owns_pages = owns_pages
        self._page_order = PageOrder(self.page_table, known=owns_pages)
        self.lengths = lengths
        self.floors = torch.zeros_like(lengths)
        self.overflowed = torch.zeros((), dtype=torch.bool, device=lengths.device)
        self.num_heads: int | None = None
        self.block_lists: Tensor | None = None
        self.group_lists: Tensor | None = None
        self._host = HostCopy(self.lengths, self.floors, known=owns_pages)
        if num_heads is not None:
            argument_checks.check_num_heads(num_heads, self.num_kv_heads)
            self.use_num_heads(num_heads)

    @property
    def batch_size(self) -> int:
        return self.page_table.shape[0]

    @property
    def separate_kv(self) -> bool:
        return self.window_rings is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.k_pages.dtype

    @property
    def device(self) -> torch.device:
        return self.k_pages.device

    @property
    def num_kv_heads(self) -> int:
        return self.k_pages.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k_pages.shape[3]

    @property
    def value_head_dim(self) -> int:
        return self.v_pages.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the cache, the pages included."""
        return sum(x.numel() * x.element_size() for x in self._tensors())

    def truncate(self, lengths: int | list[int] | Tensor):
        """Drop the last tokens: ``lengths = min(lengths, new lengths)``.

        This is for tokens that the last call appended, such as wrong guesses. At most 8 can be
        dropped if each branch has keys of its own. In tile mode, a sequence cannot go back past
        the tile before the last one that it began; after :meth:`reorder`, not into full pages.

        Args:
            lengths: new lengths, one for all sequences or ``(B,)`` of int32 or int64. A tensor on
                a GPU is not read on the host, so the call can be captured in a CUDA graph.

        Raises:
            ValueError: a sequence cannot be made so short, as far as the host knows the lengths.
                Else it becomes as short as it can, and ``overflowed`` is set.
        """
        lengths, values = argument_checks.check_lengths(lengths, self.batch_size)
        # Clamped first, because int64 wraps in int32.
        new = lengths.to(self.device).clamp(0, self.max_length).to(torch.int32)
        host = None if values is None else self._host.read()
        if host is not None and values is not None:
            wanted, host = torch.minimum(host[0], values), (_truncated(*host, values), host[1])
            if (wanted < host[0]).any():
                raise ValueError(
                    f"lengths must be at least {host[0].tolist()}, the shortest that the sequences "
                    f"can be cut to, got {values.tolist()}"
                )
        with torch.no_grad():
            after = _truncated(self.lengths, self.floors, new)
            self.overflowed |= (torch.minimum(self.lengths, new) < after).any()
            self.lengths.copy_(after)
        self._host.record(host)

    def reorder(self, index: Tensor):
        """Let sequence ``b`` continue from sequence ``index[b]``, as beam search does.

        Full pages are shared, so only the last page of each sequence is copied.

        Args:
            index: int32 or int64 ``(B,)``, in ``[0, B)``; a sequence may be named repeatedly.

        Raises:
            UnsupportedError: the cache is in the pages of a server, which owns the table.
        """
        if not self.owns_pages:
            raise UnsupportedError(
                "reorder cannot move the pages of a server: reorder its page_table, copy the open "
                "pages, and make a cache of them with Cache.from_pages"
            )
        index = argument_checks.check_index(index, self.batch_size, self.device)
        self._page_order.record(ordered=False)
        self._host.record(reorder(self, index, self._host.read()))

    def reset(self):
        """Empty every sequence, and clear ``overflowed``."""
        with torch.no_grad():
            for x in (self.lengths, self.floors, self.overflowed):
                x.zero_()
            if self.owns_pages and (not self.has_ordered_pages or is_capturing(self.lengths)):
                # Sequences that share pages must not write to them.
                own = torch.arange(self.page_table.numel(), device=self.device)
                self.page_table.copy_(own.view_as(self.page_table))
                self._page_order.record(ordered=True)
        zeros = torch.zeros(self.batch_size, dtype=torch.int32, device="cpu")
        self._host.record((zeros, zeros))

    def __repr__(self) -> str:
        return (
            f"Cache(batch_size={self.batch_size}, max_length={self.max_length}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"value_head_dim={self.value_head_dim}, separate_kv={self.separate_kv}, "
            f"page_size={self.layout.page_size}, dtype={self.dtype}, device={self.device}, "
            f"config={self.config})"
        )

    # What backends and the layer use.

    def list_slot(self, tile: Count) -> Count:
        """The slot of a tile, or of each, in ``block_lists`` and ``group_lists``."""
        return tile % self.layout.tile_slots

    def floors_at(self, floors: Tensor, lengths: Tensor) -> Tensor:
        """``floors`` after the sequences have grown to ``lengths``."""
        if self.separate_kv:
            return torch.maximum(floors, lengths - MAX_GUESSES)
        if self.config.selection == "token":
            return floors
        size, slots = self.config.q_tile_size, self.layout.tile_slots
        last = (lengths - 1).div(size, rounding_mode="floor")
        return torch.maximum(floors, (last - (slots - 1)) * size)

    @property
    def has_ordered_pages(self) -> bool:
        """Whether the host knows that sequence ``b`` has the pages from ``b * max_pages`` on."""
        return self._page_order.is_known()

    def known_lengths(self) -> list[int] | None:
        """The lengths, if the host knows them without waiting for a GPU."""
        host = self._host.read()
        return None if host is None else host[0].tolist()

    def advance(self, ends: Tensor, new: list[int] | None):
        """Set ``lengths`` to ``ends`` after an append.

        Args:
            ends: int32 or int64 ``(B,)``.
            new: tokens that the call appended to each sequence, if the host knows.
        """
        with torch.no_grad():
            host = self._grown(new)
            ends = ends.to(torch.int32)
            self.floors.copy_(self.floors_at(self.floors, ends))
            self.lengths.copy_(ends)
        self._host.record(host)

    def take_lengths(self, other: "Cache", index: Tensor):
        """Set ``lengths`` and ``floors`` to those of the sequences ``index`` of another cache."""
        source = index.to(self.device)
        with torch.no_grad():
            self.lengths.copy_(other.lengths[source])
            self.floors.copy_(other.floors[source])
            self.overflowed.copy_(other.overflowed)
        host = other._host.read() if index.device.type == "cpu" else None
        self._host.record(None if host is None else (host[0][index], host[1][index]))

    def note_advance(self, new: list[int] | None):
        """Record that a kernel has advanced the lengths, as :meth:`advance` does."""
        self._host.record(self._grown(new))

    def _grown(self, new: list[int] | None) -> tuple[Tensor, Tensor] | None:
        """The host's lengths and floors after an append of ``new`` tokens."""
        host = self._host.read()
        if host is None or new is None:
            return None
        lengths = host[0] + torch.tensor(new, dtype=torch.int32, device="cpu")
        if bool((lengths > self.max_length).any()):
            return None
        return lengths, self.floors_at(host[1], lengths)

    def use_num_heads(self, num_heads: int):
        """Make the lists of tiles for ``H`` query heads, where there are none yet."""
        layout = self.layout
        if self.num_heads is not None or not layout.tile_slots:
            return
        if is_capturing(self.lengths):
            raise ValueError(
                "num_heads must be given to nsa.Cache, or a call made before, where a CUDA graph "
                f"captures the first call with {num_heads} query heads"
            )
        self.num_heads = num_heads
        shape = (self.batch_size, layout.tile_slots, num_heads)
        with torch.inference_mode(False):

            def empty_slots(width: int) -> Tensor:
                return torch.full((*shape, width), -1, dtype=torch.int32, device=self.device)

            self.block_lists = empty_slots(layout.list_width)
            if self.config.num_cmp_selected_blocks is not None:
                self.group_lists = empty_slots(layout.group_list_width)

    def _tensors(self) -> list[Tensor]:
        tensors = [self.k_pages, self.v_pages, self.k_cmp_pages, self.v_cmp_pages]
        tensors += [self.page_table, self.lengths, self.floors, self.overflowed]
        tensors += [*(self.window_rings or ()), *(self.open_rings or ())]
        return tensors + [x for x in (self.block_lists, self.group_lists) if x is not None]


def _truncated(lengths: Tensor, floors: Tensor, new: Tensor) -> Tensor:
    """The lengths after a truncation to ``new``, as far as possible."""
    short = torch.minimum(lengths, new)
    return torch.maximum(short, torch.minimum(floors, lengths)).to(torch.int32)
