"""What the ranks of :mod:`tests.helpers.world` run. They get whole problems and cut them."""

import torch
from torch import Tensor

import nsa
from nsa.blocks import num_compressed_blocks, num_query_tiles
from nsa.distributed.order import make_pieces
from tests.helpers.emulation import emulate_kernels
from tests.helpers.strategies import Problem, leaves


def token_dim(problem: Problem) -> int:
    return 0 if problem.q.ndim == 3 else 1


def lengths_of(problem: Problem) -> list[int] | None:
    bounds = problem.extras.get("cu_seqlens")
    return None if bounds is None else bounds.diff().tolist()


def own_tokens(problem: Problem, ranks: int, rank: int, order: str) -> Tensor:
    total = problem.q.shape[token_dim(problem)]
    return make_pieces(total, ranks, order, lengths_of(problem)).tokens(rank)


def own_items(problem: Problem, tokens: Tensor, *, tiles: bool) -> Tensor:
    """The tiles that start at ``tokens``, or the compressed blocks that end at them."""
    config = problem.config
    lengths = lengths_of(problem) or [problem.q.shape[token_dim(problem)]]
    item_of, start = {}, 0
    for length in lengths:
        if tiles:
            at = [u * config.q_tile_size for u in range(num_query_tiles(length, config))]
        else:
            last = config.compress_block_size - 1
            count = num_compressed_blocks(length, config)
            at = [j * config.compress_stride + last for j in range(count)]
        item_of |= {start + position: len(item_of) + i for i, position in enumerate(at)}
        start += length
    items = [item_of[token] for token in tokens.tolist() if token in item_of]
    return torch.tensor(items, dtype=torch.int64)


def own_part(problem: Problem, ranks: int, rank: int, order: str) -> Problem:
    """This rank's part of a problem, or of its gradients."""
    dim, tokens = token_dim(problem), own_tokens(problem, ranks, rank, order)

    def cut(x, index=tokens, at=dim):
        if isinstance(x, tuple):
            return tuple(cut(item, index, at) for item in x)
        return None if x is None else x.index_select(at, index)

    extras = dict(problem.extras)
    if "gates" in extras:
        extras["gates"] = cut(extras["gates"])
    if "compressed_kv" in extras:
        blocks = own_items(problem, tokens, tiles=False)
        extras["compressed_kv"] = cut(extras["compressed_kv"], blocks)
    if "block_indices" in extras and problem.config.selection == "token":
        extras["block_indices"] = cut(extras["block_indices"])
    elif "block_indices" in extras:
        tiles = own_items(problem, tokens, tiles=True)
        extras["block_indices"] = cut(extras["block_indices"], tiles, -2)
    return Problem(cut(problem.q), cut(problem.k), cut(problem.v), problem.config, extras)


def forward(group, problem: Problem, order: str, **changes) -> Tensor:
    return nsa.distributed.forward(
        problem.q, problem.k, problem.v, mesh=group, order=order, config=problem.config,
        **(problem.extras | changes),
    )  # fmt: skip


def output_and_gradients(group, problem: Problem, order: str, dout: Tensor, backend: str) -> list:
    """Of this rank's part of the whole ``problem``."""
    if backend == "fused":
        emulate_kernels(setattr)
    own = own_part(problem, group.size(), group.rank(), order)
    inputs = [x.requires_grad_() for x in leaves(own)]
    out = forward(group, own, order, backend=backend)
    tokens = own_tokens(problem, group.size(), group.rank(), order)
    dout = dout.index_select(token_dim(problem), tokens)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout, allow_unused=True)]


def selected_blocks(group, problem: Problem, order: str) -> Tensor:
    """What this rank selects for its part of the whole ``problem``."""
    own = own_part(problem, group.size(), group.rank(), order)
    names = ("compress_k_weight", "compressed_kv", "cu_seqlens", "max_seqlen")
    extras = {name: x for name, x in own.extras.items() if name in names}
    return nsa.distributed.select_blocks(
        own.q, own.k, mesh=group, order=order, config=own.config, backend="reference", **extras
    )
