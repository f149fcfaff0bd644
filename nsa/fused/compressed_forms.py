"""The choice of the form of the compressed branch, and the numbers that follow from it.

The stages, the fake implementations of the custom ops and the memory estimate read the choice here.
"""

from enum import Enum

from nsa.blocks import num_compressed_blocks
from nsa.config import NSAConfig
from nsa.fused.fa4_call import LARGEST_TILE

ONE_TILE = 128
"""Keys in a tile of FA4's kernels."""

FEW_TOKENS = 4096
"""Keys of a sequence up to which its compressed keys may be two tiles of which none is skipped.

The backward of several sequences folds queries to skip tiles, which takes more launches: a call for
each sequence, copies of keys, and a call for the last query. With both passes folded, a layer of
dim 1024 with 255 compressed keys of 4 x 4K tokens took 142 launches and 2.6 ms of GPU time, else 92
and 2.46. With 256 compressed keys of 16K tokens folding took 2.09 ms, else 2.25.
"""

FEW_PACKED_KEYS = 4 * ONE_TILE
"""Compressed keys of a packed sequence up to which token mode skips no tile of them.

Folding packed queries makes two copies of their size in a forward and three in a backward. In four
layers of dim 1024 these took 0.4 ms of the GPU's 9.9, with sequences of up to 7045 tokens, 16K in
all. Attending the tiles that folding skips, half of those of the longest sequence, takes less.
"""

UNFOLDED_CTAS = 256
"""CTAs of a backward that is not folded, one for each head and tile of keys, from which on several
entries take it: then each processor has about two, a long and a short one."""

SINGLE_CTAS = 1
"""The same for a single entry, whose CTAs get short segments of queries if they are few."""


class CompressedForm(Enum):
    """How the compressed branch is computed.

    Attributes:
        NONE: there is no compressed token; the output is 0.
        LISTED: tiles attend listed groups (``num_cmp_selected_blocks``), queries in aligned rows.
        BATCH: causal, batched input. Tiles may be skipped, see :func:`skips_key_tiles`.
        PACKED: causal, packed sequences. Their queries are gathered into folded rows where tiles
            are skipped.
        ALL: not causal; every query attends all compressed tokens of its sequence.
    """

    NONE = "none"
    LISTED = "listed"
    BATCH = "batch"
    PACKED = "packed"
    ALL = "all"


def compressed_form(config: NSAConfig, *, packed: bool, num_compressed: int) -> CompressedForm:
    """The form for ``num_compressed`` blocks of an entry, or an upper bound if packed."""
    if num_compressed == 0:
        return CompressedForm.NONE
    if config.num_cmp_selected_blocks is not None:
        return CompressedForm.LISTED
    if not config.causal:
        return CompressedForm.ALL
    return CompressedForm.PACKED if packed else CompressedForm.BATCH


def skips_key_tiles(
    form: CompressedForm, num_compressed: int, config: NSAConfig, *, whole: bool, longest: int
) -> bool:
    """Whether kernels skip key tiles that no query of a tile sees.

    Packed queries are folded for that: those that see the same blocks become heads. The forward of
    a batch has a kernel of its own. Its backward has one too if :func:`sums_queries`; otherwise it
    folds.

    A batch skips tiles if it has more than one tile of compressed keys (more than two, up to
    ``FEW_TOKENS`` keys), or if its queries are not the ``whole`` sequences. Packed sequences skip
    tiles in three cases: results stay folded, queries are not the whole sequences, or ``longest``
    keys have more than ``FEW_PACKED_KEYS`` compressed ones. Otherwise a mask compares positions.
    """
    # Not part of the form, because torch.compile would then recompile for longer inputs.
    if form is CompressedForm.PACKED:
        # First what no length decides, for torch.compile. Then tokens, so that a power of two
        # decides: a recording knows the next one alone.
        may_mask = whole and results_in_order(config, packed=True)
        return not (may_mask and longest <= FEW_PACKED_KEYS * config.compress_stride)
    if form is not CompressedForm.BATCH:
        return False
    is_short = num_compressed * config.compress_stride <= FEW_TOKENS
    return num_compressed > (2 * ONE_TILE if is_short else ONE_TILE) or not whole


def sums_queries(
    form: CompressedForm, num_compressed: int, entries: int, heads: int, group: int
) -> bool:
    """Whether backward adds gradients of queries of the compressed and window branch in float32.

    An entry has ``num_compressed`` keys and ``heads``, of which ``group`` share a KV head: one
    alone has no sums of keys, to which several CTAs could add.
    """
    if group == 1 or form is not CompressedForm.BATCH:
        return False
    tiles = -(-num_compressed // LARGEST_TILE)
    return heads * tiles >= (SINGLE_CTAS if entries == 1 else UNFOLDED_CTAS)


def results_in_order(config: NSAConfig, packed: bool) -> bool:
    """Whether all branches have outputs and gradients of queries in token order.

    Packed tile mode leaves those of the compressed and selected branch as the kernels write them.
    """
    return not packed or config.selection == "token"


def num_compressed_bound(length: int, packed: bool, config: NSAConfig) -> int:
    """Compressed blocks in ``length`` keys of one sequence, or an upper bound if packed."""
    return length // config.compress_stride if packed else num_compressed_blocks(length, config)


def extra_rows(config: NSAConfig) -> int:
    """Folded rows of a sequence in addition to one for each compressed block."""
    started = config.compressed_visibility == "started"
    return config.compress_block_size // config.compress_stride if started else 0


def num_folded_rows(length: int, sequences: int, config: NSAConfig, *, whole: bool) -> int:
    """Upper bound on the folded rows of packed sequences with ``length`` queries in total.

    If sequences have fewer queries than keys, each may begin and end within a row.
    """
    extra = extra_rows(config)
    return length // config.compress_stride + (extra if whole else max(extra, 2)) * sequences
