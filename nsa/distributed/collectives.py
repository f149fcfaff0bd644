"""What ranks send each other, on torch.distributed alone.

Every rank calls the same collectives in the same order, so shapes alone decide which there are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import DeviceMesh, ProcessGroup

from nsa.distributed.head_copies import copy_rows
from nsa.precision import accumulation_dtype

# PyTorch 2.13 renamed both and deprecates the old names.
all_gather: Callable = (
    getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
)
reduce_scatter: Callable = (
    getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
)

all_to_all: Callable = distributed.all_to_all_single

_DIGEST_BYTES = 32


def process_group(mesh) -> ProcessGroup:
    """The group of a 1-D DeviceMesh, or the group itself."""
    if not distributed.is_available() or not distributed.is_initialized():
        raise ValueError(
            "mesh must belong to an initialised process group, got none: call "
            "torch.distributed.init_process_group first"
        )
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names or ()
            example = f"mesh[{names[-1]!r}]" if names else "a slice of it"
            raise ValueError(
                f"mesh must have 1 dimension, that of the sequence, got {mesh.ndim} {names}; pass "
                f"{example}"
            )
        if mesh.get_coordinate() is None:
            raise ValueError(f"mesh must hold this rank, {distributed.get_rank()}, got {mesh}")
        return mesh.get_group()
    # What torch.distributed.new_group returns on ranks that are not in the group.
    outside = isinstance(mesh, int) and mesh == distributed.GroupMember.NON_GROUP_MEMBER
    if not outside and not isinstance(mesh, ProcessGroup):
        raise TypeError(f"mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    if outside or distributed.get_rank(mesh) < 0:
        raise ValueError(f"mesh must hold this rank, {distributed.get_rank()}, which is not in it")
    return mesh


class Gathering:
    """An all-gather under way. Work of other tensors may be queued before :meth:`wait`.

    Args:
        x: this rank's ``(n, ...)``; as many on every rank.
        group: the ranks.
        runs: which of the rows to take, of those of all ranks one after another: where each run
            starts, and its length; all by default.
        heads: how many rows at the start of each rank's rows the first runs take, in the order of
            the ranks. These are received in place.
        swap: which of the taken rows two ranks send and receive, each in place; with ``runs``.
    """

    def __init__(
        self,
        x: Tensor,
        group: ProcessGroup,
        runs: list[tuple[int, int]] | None = None,
        heads: int = 0,
        swap: tuple[slice, slice] | None = None,
    ):
        self._finish: list[Callable[[], None]] = []
        self._held: list[Tensor] = []  # until they are sent and read
        rows, ranks = x.shape[0], group.size()
        count = ranks * rows if runs is None else sum(count for _, count in runs)
        self._out = x.new_empty(count, *x.shape[1:])
        # Hide the change from autograd, which may already have recorded views of the rows.
        out = self._out.data
        if not x.numel():
            return
        if runs is not None and swap is not None:
            self._swap(x, out, group, runs, swap)
            return
        if heads:
            assert runs is not None  # the heads are the first of these
            self._gather(x[:heads], out[: ranks * heads], group)
            x, out, tails = x[heads:], out[ranks * heads :], rows - heads
            runs = [(at // rows * tails + at % rows - heads, n) for at, n in runs[ranks:]]
        if runs is None:
            self._gather(x, out, group)
        else:
            received = x.new_empty(ranks * x.shape[0], *x.shape[1:])
            work = self._gather(x, received, group)
            self._finish[-1] = after(work, partial(_take, received, out, runs), x.device)

    def _swap(
        self,
        x: Tensor,
        out: Tensor,
        group: ProcessGroup,
        runs: list[tuple[int, int]],
        swap: tuple[slice, slice],
    ):
        rank, begin = group.rank(), 0
        sent, received = (out[rows] for rows in swap)
        # All with the other rank.
        shares = [1 - i == rank for i in range(2)]
        with beside(x.device):
            for at, count in runs:
                holder, first = divmod(at, x.shape[0])
                if holder == rank:
                    copy_rows(out[begin : begin + count], x[first : first + count])
                begin += count
            work = all_to_all(
                received, sent, group=group, async_op=True,
                output_split_sizes=[share * len(received) for share in shares],
                input_split_sizes=[share * len(sent) for share in shares],
            )  # fmt: skip
        self._held.append(out)
        self._finish.append(work.wait)

    def _gather(self, x: Tensor, received: Tensor, group: ProcessGroup):
        if x.is_contiguous():
            sent = x
            work = all_gather(received, sent, group=group, async_op=True)
        else:
            sent = torch.empty_like(x, memory_format=torch.contiguous_format)
            with beside(x.device):
                copy_rows(sent, x)
                work = all_gather(received, sent, group=group, async_op=True)
        self._held += [sent, received]
        self._finish.append(work.wait)
        return work

    @property
    def rows(self) -> Tensor:
        """The rows, which are written when :meth:`wait` has been called."""
        return self._out

    def wait(self) -> Tensor:
        for finish in self._finish:
            finish()
        self._finish, self._held = [], []
        return self._out


def _take(rows: Tensor, out: Tensor, runs: list[tuple[int, int]]):
    # Copies of slices run at the speed of memory, which index_select does not reach.
    begin = 0
    for at, count in runs:
        out[begin : begin + count].copy_(rows[at : at + count])
        begin += count


def after(work, function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Call ``function`` as soon as a collective is done, on a stream beside what is queued
    meanwhile. The function must allocate nothing. Returns a function that waits for it.
    """
    if device.type != "cuda":

        def wait():
            work.wait()
            function()

        return wait
    with beside(device):
        work.wait()
        function()
        done = torch.cuda.current_stream(device).record_event()
    return lambda: torch.cuda.current_stream(device).wait_event(done)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """A stream that starts after what is queued now and runs beside what is queued later. Nothing
    may be allocated on it."""
    if device.type != "cuda":
        yield
        return
    stream = _second_stream(device)
    # Earlier work may still use what is written to.
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


@lru_cache(maxsize=None)
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


class Exchanging:
    """A reduce-scatter under way, which sends 16-bit tensors as they are and rounds their sum once.

    Two ranks reduce as they send. Of more, each adds what it receives in float32, in the order of
    the ranks.

    Args:
        x: this rank's addends ``(ranks * n, ...)``, rank after rank.
        group: the ranks.
        target: ``(n, ...)``, where :meth:`wait` leaves the sum of this rank's part. Two ranks
            reduce into it if it is contiguous.
    """

    def __init__(self, x: Tensor, group: ProcessGroup, target: Tensor):
        self._sent, self._target = x, target
        self._ranks = group.size()
        if self._ranks == 2:
            move = reduce_scatter
            self._out = target if target.is_contiguous() else x.new_empty(target.shape)
        else:
            move = all_to_all
            self._out = torch.empty_like(x)
        self._work = move(self._out, x, group=group, async_op=True) if x.numel() else None

    def wait(self):
        if self._work is not None:
            self._work.wait()
        if self._ranks != 2:
            # Sums of 16-bit tensors are in float32.
            copy_rows(self._target, self._out.unflatten(0, (self._ranks, -1)).sum(0))
        elif self._out is not self._target:
            copy_rows(self._target, self._out)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, take: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.rows, ctx.dtype = group, group.size() * x.shape[0], x.dtype
        ctx.save_for_backward(take)
        return Gathering(x, group).wait().index_select(0, take)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (take,) = ctx.saved_tensors
        grad = grad.to(accumulation_dtype(grad.dtype))
        parts = grad.new_zeros(ctx.rows, *grad.shape[1:]).index_add_(0, take, grad)
        total = parts.new_empty(ctx.rows // ctx.group.size(), *parts.shape[1:])
        if parts.numel():
            reduce_scatter(total, parts, group=ctx.group, async_op=True).wait()
        return total.to(ctx.dtype), None, None


def gather_rows(x: Tensor, take: Tensor, group: ProcessGroup) -> Tensor:
    """Rows ``take`` of the ``x (n, ...)`` of all ranks one after another, differentiable.

    The gradient of ``x`` is the sum of what all ranks send, in float32.
    """
    return _GatherRows.apply(x, take, group)


def agree(group: ProcessGroup, facts: dict[str, Any], problem: Exception | None):
    """Raise on all ranks if one has a problem or their facts differ, before they wait for others.

    Args:
        group: the ranks.
        facts: what must be equal on all ranks.
        problem: what is wrong on this rank.

    Raises:
        ValueError: facts differ, or another rank has a problem; the message has both by rank.
        Exception: ``problem`` itself.
    """
    text = repr(facts) if problem is None else f"{type(problem).__name__}: {problem}"
    digest = bytes([problem is not None]) + blake2b(text.encode(), digest_size=31).digest()
    place = torch.device("cpu" if _takes_cpu(group) else "cuda")
    own = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    everyone = _on_side_stream(lambda: Gathering(own.to(place), group).wait().tolist(), place)
    digests = [everyone[i : i + _DIGEST_BYTES] for i in range(0, len(everyone), _DIGEST_BYTES)]
    if all(x == digests[0] for x in digests) and not digests[0][0]:
        return
    texts: list[Any] = [None] * group.size()
    distributed.all_gather_object(texts, (problem is not None, text, facts), group=group)
    if problem is not None:
        raise problem
    raise ValueError(_describe(texts))


def _describe(texts: list) -> str:
    """What ranks disagree on, with the values by rank."""
    failed = [f"rank {rank}: {text}" for rank, (bad, text, _) in enumerate(texts) if bad]
    if failed:
        return "another rank cannot make this call: " + "; ".join(failed)
    names = dict.fromkeys(name for _, _, facts in texts for name in facts)
    if len({facts["function"] for _, _, facts in texts}) > 1:
        names = {"function": None}  # they have different arguments
    lines = []
    for name in names:
        values = [facts.get(name) for _, _, facts in texts]
        if any(x != values[0] for x in values):
            by_rank = ", ".join(f"rank {rank} {value}" for rank, value in enumerate(values))
            lines.append(f"{name}: {by_rank}")
    return "all ranks must make the same call, but differ in " + "; ".join(lines)


def _takes_cpu(group: ProcessGroup) -> bool:
    """Whether the group has a backend for CPU tensors, so that no GPU must be waited for."""
    return "cpu:" in distributed.get_backend_config(group)


def _on_side_stream(function: Callable, device: torch.device):
    """``function()``, without waiting for what the GPU has to do before."""
    if device.type != "cuda":
        return function()
    with torch.cuda.stream(torch.cuda.Stream()):
        return function()
