"""FA4's calls without most of their host work: a part of ``fa4``, and like it of one version.

``_flash_attn_fwd`` and ``_flash_attn_bwd`` check their arguments, choose tiles and look compiled
kernels up by some 80 values: 0.1 to 0.25 ms a call, which short sequences wait for. All of that
follows from shapes, strides and options. So a call with new ones is FA4's own, and it is noted
which kernels that calls with what; calls alike then call the kernels. Where FA4 passes a kernel
anything but what is expected here (it copied a tensor, or the GPU is another), no call is replayed.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

MAX_KNOWN = 1024
"""Calls to know; a program with more different ones starts over."""

_ALIGNMENT = 16

# Where the window is in the arguments of the forward and of the backward kernel.
_FORWARD_WINDOW = slice(11, 13)
_BACKWARD_WINDOW = slice(14, 16)


Bounds = tuple[Tensor | None, Tensor | None]
"""Boundaries of packed sequences of queries and of keys."""


class Tensors(NamedTuple):
    """Arguments of ``_flash_attn_fwd`` that may differ from call to call.

    Attributes:
        q, k, v, out, lse: as there.
        scale: its ``softmax_scale``.
        bounds: its ``cu_seqlens_q`` and ``cu_seqlens_k``.
        lists: counts and indices of its ``block_sparse_tensors``, or empty.
        aux: its ``aux_tensors``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor | None
    lse: Tensor | None
    scale: float
    bounds: Bounds = (None, None)
    lists: tuple[Tensor, ...] = ()
    aux: list[Tensor] | None = None

    def layouts(self) -> tuple:
        """All that FA4's choices depend on."""
        tensors = (*self[:5], *self.bounds, *self.lists, *(self.aux or ()))
        return tuple(map(_layout, tensors))

    def with_results(self) -> "Tensors":
        """The same with ``out`` and ``lse`` as FA4 allocates them."""
        q, out, lse = self.q, self.out, self.lse
        if out is None:
            out = q.new_empty((*q.shape[:-1], self.v.shape[-1]))
        if lse is None:
            lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)
        return self._replace(out=out, lse=lse)

    def arguments(self, window: tuple, aux_data: Callable) -> tuple:
        """What FA4 passes to a kernel for SM90."""
        inputs = map(_detached, self[:3])
        sparse = (*self.lists, *(None,) * 4) if self.lists else None
        results = (self.out, self.lse, self.scale)
        unused = (None,) * 3
        aux = aux_data(self.aux, None)
        return (*inputs, *results, *self.bounds, *unused, *window, None, sparse, aux, None, None)


class BackwardTensors(NamedTuple):
    """The same of ``_flash_attn_bwd``, without lists."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    dq: Tensor | None
    scale: float
    bounds: Bounds = (None, None)

    def layouts(self) -> tuple:
        return tuple(map(_layout, (*self[:7], *self.bounds)))


class _Sums(NamedTuple):
    """FA4's float32 buffers of a backward; ``dk`` and ``dv`` where heads share a KV head."""

    softmax: Tensor
    lse_log2: Tensor
    dq: Tensor
    dk: Tensor | None
    dv: Tensor | None

    @classmethod
    def new(cls, shapes: tuple, like: Tensor) -> "_Sums":
        """Of these shapes, in fewer allocations and fills than FA4 makes."""
        _, rows, dq, dk, dv = shapes
        kind = dict(dtype=torch.float32, device=like.device)
        dk_dv = (None, None)
        if dk is not None:
            dk_dv = torch.zeros((2, *dk), **kind) if dk == dv else _zeros(dk, dv, **kind)
        return cls(*torch.empty((2, *rows), **kind), torch.empty(dq, **kind), *dk_dv)


class _Note(NamedTuple):
    """A call of a compiled kernel."""

    kernel: Callable
    arguments: tuple


class _Call(NamedTuple):
    """Compiled kernels, the window as FA4 passes it on, and the shapes of :class:`_Sums`."""

    kernels: list[Callable]
    window: tuple
    sums: tuple = ()


_known: dict[tuple, _Call] = {}


def forward(interface, tensors: Tensors, **options) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of ``interface._flash_attn_fwd``.

    ``interface`` is the module ``flash_attn.cute.interface``. ``options`` are hashable: other
    arguments of the function, and of ``lists`` the ``block_size``.
    """
    if interface.is_fake_mode():
        # Tensors without data, to compile kernels with.
        return _full_forward(interface, interface._flash_attn_fwd, tensors, options)
    key = (tensors.scale, tensors.layouts(), *options.items())
    call = _known.get(key)
    if call is None:
        return _noted_forward(interface, key, tensors, options)
    tensors = tensors.with_results()
    call.kernels[0](*tensors.arguments(call.window, interface.AuxData))
    return tensors.out, tensors.lse


def backward(interface, tensors: BackwardTensors, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``interface._flash_attn_bwd``; ``options`` are its other arguments."""
    if interface.is_fake_mode():
        return _full_backward(interface._flash_attn_bwd, tensors, options)
    key = (tensors.scale, tensors.layouts(), *options.items())
    call = _known.get(key)
    if call is None:
        return _noted_backward(interface, key, tensors, options)
    grads = (
        torch.empty_like(tensors.q) if tensors.dq is None else tensors.dq,
        torch.empty_like(tensors.k),
        torch.empty_like(tensors.v),
    )
    sums = _Sums.new(call.sums, tensors.q)
    steps = _backward_arguments(tensors, grads, sums, call.window, interface.AuxData)
    for kernel, arguments in zip(call.kernels, steps, strict=True):
        kernel(*arguments)
    return grads


def _backward_arguments(
    tensors: BackwardTensors,
    grads: tuple[Tensor, Tensor, Tensor],
    sums: _Sums,
    window: tuple,
    aux_data: Callable,
) -> list[tuple]:
    """What FA4 passes to its kernels for SM90."""
    dout, q, k, v, out, lse, _, scale, (bounds_q, bounds_k) = tensors
    dq, dk, dv = grads
    none = (None,) * 8
    inputs = (*map(_detached, (q, k, v)), dout, sums.lse_log2, sums.softmax, sums.dq)
    shared = sums.dk is not None
    main = (
        *(*inputs, *(sums[3:] if shared else (dk, dv)), scale, *tensors.bounds, *none[:2]),
        *(*window, *none[:3], aux_data(None, None), None, None),
    )
    preprocess = (out, dout, sums.softmax, lse, *sums[1:3], bounds_q, *none[:4], 1.0, *none[:2])
    converts = [(sums.dq, dq, scale, bounds_q)]
    if shared:
        converts += [(sums.dk, dk, scale, bounds_k), (sums.dv, dv, 1.0, bounds_k)]
    return [preprocess, main, *((*convert, *none[:3]) for convert in converts)]


def _noted_forward(interface, key: tuple, tensors: Tensors, options: dict) -> tuple[Tensor, Tensor]:
    with _noting(interface, "_flash_attn_fwd") as (function, notes):
        out, lse = _full_forward(interface, function, tensors, options)
        if len(notes) == 1:
            ((kernel, arguments),) = notes
            window = tuple(arguments[_FORWARD_WINDOW])
            results = tensors._replace(out=out, lse=lse)
            if _same(arguments, results.arguments(window, interface.AuxData)):
                _remember(key, _Call([kernel], window))
    return out, lse


def _noted_backward(
    interface, key: tuple, tensors: BackwardTensors, options: dict
) -> tuple[Tensor, Tensor, Tensor]:
    names = ("_bwd_preprocess", "_bwd_postprocess_convert", "_flash_attn_bwd")
    with _noting(interface, *names) as (function, notes):
        grads = _full_backward(function, tensors, options)
        if len(notes) in (3, 5):
            preprocess, main, *converts = (note.arguments for note in notes)
            shared = main[7:9] if len(converts) == 3 else (None, None)
            sums = _Sums(preprocess[2], *preprocess[4:6], *shared)
            window = tuple(main[_BACKWARD_WINDOW])
            steps = _backward_arguments(tensors, grads, sums, window, interface.AuxData)
            if _same([note.arguments for note in notes], steps):
                shapes = tuple(None if x is None else x.shape for x in sums)
                _remember(key, _Call([note.kernel for note in notes], window, shapes))
    return grads


def _remember(key: tuple, call: _Call):
    if len(_known) >= MAX_KNOWN:
        _known.clear()
    _known[key] = call


def _full_forward(
    interface, function: Callable, tensors: Tensors, options: dict
) -> tuple[Tensor, Tensor]:
    options, sparse = dict(options), None
    block_size = options.pop("block_size", None)
    if tensors.lists:
        sparse = interface.BlockSparseTensorsTorch(*tensors.lists, block_size=block_size)
    out, lse, *_ = function(
        q=tensors.q,
        k=tensors.k,
        v=tensors.v,
        out=tensors.out,
        lse=tensors.lse,
        softmax_scale=tensors.scale,
        cu_seqlens_q=tensors.bounds[0],
        cu_seqlens_k=tensors.bounds[1],
        block_sparse_tensors=sparse,
        aux_tensors=tensors.aux,
        return_lse=True,
        **options,
    )
    return out, lse


def _full_backward(
    function: Callable, tensors: BackwardTensors, options: dict
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = tensors._asdict()
    scale, (bounds_q, bounds_k) = arguments.pop("scale"), arguments.pop("bounds")
    bounds = dict(cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k)
    return function(softmax_scale=scale, **arguments, **bounds, **options)


@contextmanager
def _noting(interface, *names: str) -> Iterator[tuple[Callable, list[_Note]]]:
    """The last of the named functions, and where it notes the kernels that any of them call."""
    # Over a copy of FA4's globals, in which the names that lead to its caches differ.
    notes, variables = [], dict(vars(interface))
    for name in names:
        original = getattr(interface, name)
        function = types.FunctionType(
            original.__code__, variables, name, original.__defaults__, original.__closure__
        )
        function.__kwdefaults__ = original.__kwdefaults__
        function.compile_cache = _NotingCache(original.compile_cache, notes)
        variables[name] = function
    try:
        yield function, notes
    finally:
        # The functions and their globals lead to each other, and so live until Python looks for
        # such cycles: without the tensors.
        notes.clear()


class _NotingCache:
    """FA4's cache of compiled kernels, noting the calls of those out of it."""

    def __init__(self, cache, notes: list[_Note]):
        self.cache, self.notes = cache, notes

    def __contains__(self, key) -> bool:
        return key in self.cache

    def __setitem__(self, key, kernel):
        self.cache[key] = kernel

    def __getitem__(self, key) -> Callable:
        kernel = self.cache[key]

        def noted(*arguments):
            self.notes.append(_Note(kernel, arguments))
            return kernel(*arguments)

        return noted


def _zeros(*shapes: tuple, **kind) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(shape, **kind) for shape in shapes)


def _detached(x: Tensor) -> Tensor:
    """As no leaf of autograd, because kernels take tensors by DLPack."""
    return x.detach() if x.requires_grad else x


def _layout(x: Tensor | None) -> tuple | None:
    if x is None:
        return None
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % _ALIGNMENT


def _same(x, y) -> bool:
    """Whether two arguments are the same tensor or value."""
    if isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)):
        return len(x) == len(y) and all(map(_same, x, y))
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.data_ptr() == y.data_ptr() and _layout(x) == _layout(y)
    return type(x) is type(y) and x == y
