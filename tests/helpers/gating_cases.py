"""Problems for the gated sum, and one call that returns results of kernels or emulations."""

from typing import NamedTuple

import torch

import nsa
from nsa.boundaries import boundaries_of
from nsa.fused.kernel_inputs import IN_ORDER, Placement, StatisticsPlacements
from nsa.fused.planning import make_plan
from nsa.precision import accumulation_dtype
from nsa.testing import make_cu_seqlens
from tests.helpers.gpu_cases import slice_of_heads

FORMS = ["weight", "gates", "mean"]


def make_problem(form: str, shape, dtype=torch.float64, device="cpu"):
    """(branches, q, gates, weight, dout) for ``shape (B, T, H, D)``."""
    x = torch.randn(5, *shape, dtype=dtype, device=device)
    gates = weight = None
    if form == "gates":
        gates = torch.randn(*shape[:3], 3, dtype=dtype, device=device)
    if form == "weight":
        weight = torch.randn(shape[2], 3, shape[3], dtype=dtype, device=device)
    return x[:3].unbind(), x[3], gates, weight, x[4]


class Statistics(NamedTuple):
    """Log-sum-exps of the branches, and where each row and head lies in them."""

    lses: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
    placements: StatisticsPlacements


def make_statistics(shape, placements: StatisticsPlacements, sizes=(0, 0)) -> Statistics:
    """For branches of ``shape (R, H, D)``; some rows have no key.

    ``sizes`` are the numbers in a branch whose placement has places.
    """
    rows, heads, _ = shape
    lses = []
    for placement, size in zip(placements, (*sizes, 0), strict=True):
        if placement is None:
            lses.append(None)
            continue
        device = "cpu" if placement.place is None else placement.place.device
        in_rows = max(rows * placement.unit, heads * placement.head_stride)
        count = in_rows if placement.place is None else size
        lse = 4 * torch.randn(count, dtype=torch.float64, device=device)
        lses.append(torch.where(torch.rand_like(lse) < 0.1, -torch.inf, lse).float().double())
    return Statistics(tuple(lses), placements)


def in_order(rows: int, heads: int) -> StatisticsPlacements:
    """Of a batch, by head, but the selected branch by row."""
    by_head = Placement(None, 1, heads, 0, rows)
    return by_head, Placement(None, heads, heads, 0), by_head


def results(
    kernels, branches, q, gates, weight, dout, statistics: Statistics, placements=IN_ORDER
) -> list[torch.Tensor]:
    """The output, the gradient of ``q`` (written over one of its terms), what the branches get, the
    other gradients."""
    out = slice_of_heads(q[None])[0]
    out = kernels.gating_forward(*branches, q, gates, weight, out, placements)
    dtype = accumulation_dtype(q.dtype)
    lses = (None if x is None else x.to(q.device, dtype) for x in statistics.lses)
    douts, numbers, dlogits, dgates, dweight = kernels.gating_backward(
        dout, *branches, *lses, q, gates, weight, statistics.placements, placements
    )
    numbers = [x for pair in numbers if pair is not None for x in pair]
    dq = kernels.query_gradient(*branches, dlogits, weight, branches[2], placements)
    found = (out, dq, *douts, dlogits, dgates, dweight, *numbers)
    return [x for x in found if x is not None]


def place(x: torch.Tensor, placement, size: int) -> torch.Tensor:
    """Put ``x (R, H, D)`` where ``placement`` says, one vector at a time; NaN elsewhere."""
    placed = x.new_full((size, 1, x.shape[2]), torch.nan)
    for row, start in enumerate(placement.place.tolist()):
        for head in range(x.shape[1]):
            group, member = divmod(head, placement.group)
            if start >= 0:
                vector = start * placement.unit + group * placement.group_stride + member
                placed[vector, 0] = x[row, head]
    return placed


def make_placements(lengths, heads, kv_heads, visibility, device="cpu"):
    """Placements of packed sequences, (folded, aligned rows), and the vectors of each layout."""
    config = nsa.NSAConfig(
        compress_block_size=16, select_block_size=64, q_tile_size=64,
        compressed_visibility=visibility,
    )  # fmt: skip
    q = torch.empty(1, sum(lengths), heads, 8, device=device)
    plan = make_plan(q, config, boundaries_of(make_cu_seqlens(lengths).to(device), max(lengths)))
    placements = plan.query_placements(q.shape[2], kv_heads)
    return placements, (plan.folded.rows.total * 16 * heads, plan.queries.rows * heads), plan
