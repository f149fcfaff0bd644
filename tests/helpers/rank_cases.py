"""What the ranks of :mod:`tests.helpers.world` run. They get whole problems and cut them."""

import time
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

import nsa
from nsa.blocks import num_compressed_blocks, num_query_tiles
from nsa.distributed import backend_calls, call, collectives, rank_layout
from nsa.distributed.order import make_pieces
from nsa.fused import compressed_blocks, entry, key_sums
from nsa.testing import assert_as_accurate
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
        return None if x is None else x.index_select(at, index.to(x.device))

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


def selected_blocks(group, problem: Problem, order: str, backend: str) -> Tensor:
    """What this rank selects for its part of the whole ``problem``."""
    own = own_part(problem, group.size(), group.rank(), order)
    names = ("compress_k_weight", "compressed_kv", "cu_seqlens", "max_seqlen")
    extras = {name: x for name, x in own.extras.items() if name in names}
    return nsa.distributed.select_blocks(
        own.q, own.k, mesh=group, order=order, config=own.config, backend=backend, **extras
    )


def several_chunks(group, *arguments) -> list:
    """:func:`output_and_gradients` with a chunk for each KV head."""
    with patch.object(call, "CHUNK_BYTES", 1):
        return output_and_gradients(group, *arguments)


def many_runs(group, *arguments) -> list:
    """:func:`output_and_gradients` with keys taken by index, as of many sequences."""
    with patch.object(rank_layout, "MAX_RUNS", 0):
        rank_layout._kept_layout.cache_clear()
        results = output_and_gradients(group, *arguments)
    rank_layout._kept_layout.cache_clear()
    return results


def separate_calls(group, *arguments) -> list:
    """:func:`output_and_gradients` with a call of the backend for each query segment."""
    with patch.multiple(backend_calls, MAX_CALLS=1000, MIN_TOKENS=0):
        rank_layout._kept_layout.cache_clear()
        results = several_chunks(group, *arguments)
    rank_layout._kept_layout.cache_clear()
    return results


def separate_calls_of_many_runs(group, *arguments) -> list:
    with patch.object(rank_layout, "MAX_RUNS", 0):
        return separate_calls(group, *arguments)


def separate_calls_that_add(group, *arguments) -> list:
    """:func:`separate_calls`, whose gradients of keys and values must be added where kernels do."""
    rounded = []

    def noted(self, *arguments):
        rounded.append(arguments)
        return original(self, *arguments)

    original = key_sums.KeySums.round_into
    with patch.object(key_sums.KeySums, "round_into", noted):
        results = separate_calls(group, *arguments)
    assert rounded
    return results


def calls_and_means_that_add(group, *arguments) -> list:
    """:func:`separate_calls_that_add`, where one pass must add the gradients of means too."""
    added = []

    def noted(*tensors):
        added.append(tensors[-1] is not None)
        return original(*tensors)

    original = compressed_blocks.compress_pair_backward
    with patch.object(compressed_blocks, "compress_pair_backward", noted):
        results = separate_calls_that_add(group, *arguments)
    assert added == [True]
    return results


def after_inference(group, problem: Problem, *arguments) -> list:
    """:func:`output_and_gradients`, after calls without gradients that make the index tensors."""
    rank_layout._kept_layout.cache_clear()
    order = arguments[0]
    own = own_part(problem, group.size(), group.rank(), order)
    with torch.inference_mode():
        first = forward(group, own, order, backend="reference")
    with torch.no_grad():
        second = forward(group, own, order, backend="reference")
    results = output_and_gradients(group, problem, *arguments)
    for out in (first, second):
        torch.testing.assert_close(out, results[0], rtol=0, atol=0)
    return results


def checkpointed(group, problem: Problem, order: str, dout: Tensor, backend: str) -> list:
    """:func:`output_and_gradients`, but backward computes the forward again."""

    def again(*args, **kwargs):
        return checkpoint(partial(original, **kwargs), *args, use_reentrant=False)

    original = nsa.distributed.forward
    with patch.object(nsa.distributed, "forward", again):
        return output_and_gradients(group, problem, order, dout, backend)


def traffic(
    group, problem: Problem, order: str, dout: Tensor, backend: str, separate: bool = False
) -> list:
    """What each collective of a forward and backward sends: ``(name, shape, dtype)``.

    With ``separate``, of :func:`separate_calls`.
    """
    found = []

    def spy(name: str, original):
        def call(out, x, **options):
            found.append((name, tuple(x.shape), str(x.dtype)))
            return original(out, x, **options)

        return patch.object(collectives, name, call)

    names = ("all_gather", "reduce_scatter", "all_to_all")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(spy(name, getattr(collectives, name)))
        case = separate_calls if separate else several_chunks
        case(group, problem, order, dout, backend)
    return found


def workspace_limits(group, problem: Problem, order: str, dout: Tensor) -> list[int | None]:
    """What limits the workspace of each call of the fused backend, forward and backward."""
    found = []

    def noted(*arguments, max_workspace_bytes, **options):
        found.append(max_workspace_bytes)
        return make_schedule(*arguments, max_workspace_bytes=max_workspace_bytes, **options)

    make_schedule = entry.make_schedule
    with patch.object(entry, "make_schedule", noted):
        several_chunks(group, problem, order, dout, "fused")
    return found


def saved_shapes(group, problem: Problem, order: str) -> list[tuple]:
    """Shape of each tensor that the node of the attention saves."""
    emulate_kernels(setattr)
    own = own_part(problem, group.size(), group.rank(), order)
    for x in leaves(own):
        x.requires_grad_()
    out = forward(group, own, order, backend="fused")
    node = out.grad_fn
    while "AttentionNode" not in type(node).__name__:
        node = node.next_functions[0][0]
    return [tuple(x.shape) for x in node.saved_tensors if x is not None]


def round_trip(group, x: Tensor, dim: int, order: str, cu_seqlens: Tensor | None) -> tuple:
    """This rank's part, the whole from all parts, positions of own tokens."""
    own = nsa.distributed.shard(x, group, dim, order, cu_seqlens=cu_seqlens)
    whole = nsa.distributed.unshard(own, group, dim, order, cu_seqlens=cu_seqlens)
    places = nsa.distributed.positions(x.shape[dim], group, order, cu_seqlens=cu_seqlens)
    return own, whole, places


def error_of(
    group, problems: list[Problem], changes: list[dict], orders: list[str], rank=None
) -> str:
    """The error of a forward to which each rank gives its own arguments."""
    rank = group.rank() if rank is None else rank
    try:
        forward(group, problems[rank], orders[rank], backend="reference", **changes[rank])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def error_of_different_functions(group, problem: Problem) -> str:
    try:
        if group.rank() == 0:
            forward(group, problem, "head-tail")
        else:
            nsa.distributed.select_blocks(problem.q, problem.k, mesh=group, config=problem.config)
    except ValueError as error:
        return str(error)
    return "no error"


def error_of_meta_tensors(group, problem: Problem) -> str:
    mesh = DeviceMesh.from_group(group, "cpu")
    problem = moved(problem, "meta", torch.float64)
    return error_of(mesh, [problem] * 2, [{}] * 2, ["head-tail"] * 2, rank=group.rank())


def errors_of_helpers(group) -> list[str]:
    """Errors that need a process group."""
    texts = []

    def note(function, *args, **kwargs):
        try:
            function(*args, **kwargs)
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
        else:
            texts.append("no error")

    x = torch.zeros(1, 12 + group.rank(), 2)
    mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("dp", "cp"))
    note(nsa.distributed.unshard, x, group, 1)
    note(nsa.distributed.unshard, torch.zeros(1, 12, 2, requires_grad=True), group, 1)
    note(nsa.distributed.shard, torch.zeros(1, 13, 2), group, 1)
    note(nsa.distributed.shard, torch.zeros(1, 12, 2), mesh, 1)
    note(nsa.distributed.shard, torch.zeros(1, 12, 2), "mesh", 1)
    note(nsa.distributed.shard, torch.zeros(1, 12, 2), mesh["cp"], 1, "zigzag")
    note(nsa.distributed.shard, torch.zeros(1, 12, 2), mesh["cp"], 1)
    return texts


def fused_error(group, problem: Problem) -> str:
    try:
        forward(group, problem, "head-tail", backend="fused")
    except nsa.UnsupportedError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def sleep_on_rank_1(group):
    if group.rank() == 1:
        time.sleep(60)


def gpu_accuracy(
    group, problem: Problem, order: str, separate: bool, device: str = "cuda"
) -> float:
    """Check this rank's part of a float64 ``problem``, computed in bfloat16 by the fused backend.

    The error against float64 is held to that of the reference in bfloat16 over the whole.

    Args:
        separate: whether each query segment is a call of its own.

    Returns:
        The share of rows whose selection is that of one GPU.
    """
    rank_layout._kept_layout.cache_clear()
    backend_calls.MIN_TOKENS = 0 if separate else 1 << 30
    ranks, rank = group.size(), group.rank()
    problem = moved(problem, device, torch.bfloat16)
    dout = torch.randn(problem.q.shape, dtype=torch.bfloat16, device=device)
    distributed.broadcast(dout, 0, group=group)
    blocks = problem.select_blocks(backend="fused")
    given = problem._replace(extras=problem.extras | {"block_indices": blocks})
    results = [
        output_and_leaves(moved(given, device, dtype), dout.to(dtype), backend="reference")
        for dtype in (torch.float64, torch.bfloat16)
    ]
    own = own_part(given, ranks, rank, order)
    tokens = own_tokens(problem, ranks, rank, order).to(device)
    own_dout = dout.index_select(token_dim(problem), tokens)
    found = output_and_leaves(own, own_dout, group=group, order=order, backend="fused")
    for name, x in found.items():
        exact, same_dtype = (result[name] for result in results)
        if name in SUMMED:
            x = x.float()
            distributed.all_reduce(x, group=group)
            x = x.to(torch.bfloat16)
        else:
            exact, same_dtype = (
                y.index_select(token_dim(problem), tokens) for y in (exact, same_dtype)
            )
        assert_as_accurate(name, x, same_dtype, exact)
    selected = selected_blocks(group, moved(problem, device, torch.bfloat16), order, "fused")
    return (selected == own.extras["block_indices"]).all(-1).double().mean().item()


SUMMED = ("gate_proj_weight", "compress_k_weight", "compress_v_weight")


def moved(problem: Problem, device: str, dtype: torch.dtype) -> Problem:
    """The problem on a device, its float tensors in a dtype."""

    def move(x):
        if isinstance(x, tuple):
            return tuple(map(move, x))
        if not isinstance(x, Tensor):
            return x
        return x.detach().to(device, dtype if x.is_floating_point() else None)

    extras = {name: move(x) for name, x in problem.extras.items()}
    return Problem(*map(move, problem[:3]), problem.config, extras)


def output_and_leaves(problem: Problem, dout: Tensor, group=None, order="", **options) -> dict:
    """The output and gradients by name of a problem with one K/V."""
    names = ["q", "k", "v", *(x for x in problem.extras if x in (*SUMMED, "gates"))]
    inputs = [x.requires_grad_() for x in leaves(problem)]
    one = group is None
    out = problem.forward(**options) if one else forward(group, problem, order, **options)
    grads = torch.autograd.grad(out, inputs, dout)
    return {"out": out.detach()} | dict(zip(names, grads, strict=True))


def second_derivative(group, problem: Problem) -> str:
    """The error of a second derivative."""
    own = own_part(problem, group.size(), group.rank(), "head-tail")
    q, *_ = (x.requires_grad_() for x in leaves(own))
    out = forward(group, own, "head-tail", backend="reference")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    try:
        torch.autograd.grad(grad.sum(), q)
    except nsa.UnsupportedError as error:
        return str(error)
    return "no error"


def twice_backward(group, problem: Problem) -> bool:
    """Whether a second backward through a kept graph gives the gradients of the first."""
    own = own_part(problem, group.size(), group.rank(), "head-tail")
    inputs = [x.requires_grad_() for x in leaves(own)]
    total = forward(group, own, "head-tail", backend="reference").square().sum()
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    return all(map(torch.equal, first, torch.autograd.grad(total, inputs)))
