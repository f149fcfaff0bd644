"""FA4's forward without most of its host work: a part of ``fa4``, and like it of one version.

``_flash_attn_fwd`` checks its arguments, chooses tiles and looks a compiled kernel up by some 80
values: 0.1 ms and more a call, which short sequences wait for. All of that follows from shapes,
strides and options. So a call with new ones is FA4's own, and it is noted which kernel that calls
with what; calls alike then call the kernel. Where FA4 passes the kernel anything but what
:meth:`Tensors.arguments` expects (it copied a tensor, or the GPU is another), no call is replayed.
"""

import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MAX_KNOWN = 1024
"""Calls to know; a program with more different ones starts over."""

_ALIGNMENT = 16

# Where the window is in a kernel's arguments.
_WINDOW = slice(11, 13)


class Tensors(NamedTuple):
    """Arguments of ``_flash_attn_fwd`` that may differ from call to call; the input is batched.

    Attributes:
        q, k, v, out, lse: as there.
        scale: its ``softmax_scale``.
        lists: counts and indices of its ``block_sparse_tensors``, or empty.
        aux: its ``aux_tensors``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor | None
    lse: Tensor | None
    scale: float
    lists: tuple[Tensor, ...] = ()
    aux: list[Tensor] | None = None

    def layouts(self) -> tuple:
        """All that FA4's choices depend on."""
        tensors = (*self[:5], *self.lists, *(self.aux or ()))
        return tuple(map(_layout, tensors))

    def with_results(self) -> "Tensors":
        """The same with ``out`` and ``lse`` as FA4 allocates them."""
        q, out, lse = self.q, self.out, self.lse
        if out is None:
            out = q.new_empty((*q.shape[:-1], self.v.shape[-1]))
        if lse is None:
            lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        return self._replace(out=out, lse=lse)

    def arguments(self, window: tuple, aux_data: Callable) -> tuple:
        """What FA4 passes to a kernel for SM90; not in packed input."""
        # As no leaf of autograd, because kernels take tensors by DLPack.
        inputs = (x.detach() for x in self[:3])
        sparse = (*self.lists, *(None,) * 4) if self.lists else None
        results = (self.out, self.lse, self.scale)
        unused = (None,) * 5
        aux = aux_data(self.aux, None)
        return (*inputs, *results, *unused, *window, None, sparse, aux, None, None)


class _Call(NamedTuple):
    """A compiled kernel, and the window as FA4 passes it on."""

    kernel: Callable
    window: tuple


_known: dict[tuple, _Call] = {}


def forward(interface, tensors: Tensors, **options) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of ``interface._flash_attn_fwd``.

    ``interface`` is the module ``flash_attn.cute.interface``. ``options`` are hashable: other
    arguments of the function, and of ``lists`` the ``block_size``.
    """
    if interface.is_fake_mode():
        # Tensors without data, to compile kernels with.
        return _full_call(interface, interface._flash_attn_fwd, tensors, options)
    key = (tensors.scale, tensors.layouts(), *options.items())
    call = _known.get(key)
    if call is None:
        return _noted_call(interface, key, tensors, options)
    tensors = tensors.with_results()
    call.kernel(*tensors.arguments(call.window, interface.AuxData))
    return tensors.out, tensors.lse


def _noted_call(interface, key: tuple, tensors: Tensors, options: dict) -> tuple[Tensor, Tensor]:
    original = interface._flash_attn_fwd
    notes = _NotingCache(original.compile_cache)
    # FA4's function over a copy of its globals, in which the name that leads to its cache differs.
    names = dict(vars(interface), _flash_attn_fwd=types.SimpleNamespace(compile_cache=notes))
    function = types.FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )
    out, lse = _full_call(interface, function, tensors, options)
    call = notes.call_for(tensors._replace(out=out, lse=lse), interface.AuxData)
    if call is not None:
        if len(_known) >= MAX_KNOWN:
            _known.clear()
        _known[key] = call
    return out, lse


def _full_call(
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
        block_sparse_tensors=sparse,
        aux_tensors=tensors.aux,
        return_lse=True,
        **options,
    )
    return out, lse


class _NotingCache:
    """FA4's cache of compiled kernels, with the last call of a kernel out of it."""

    def __init__(self, cache):
        self.cache = cache
        self.kernel, self.arguments = None, ()

    def __contains__(self, key) -> bool:
        return key in self.cache

    def __setitem__(self, key, kernel):
        self.cache[key] = kernel

    def __getitem__(self, key) -> Callable:
        kernel = self.cache[key]

        def noted(*arguments):
            self.kernel, self.arguments = kernel, arguments
            return kernel(*arguments)

        return noted

    def call_for(self, tensors: Tensors, aux_data: Callable) -> _Call | None:
        """The call, if there was one with the arguments that are expected for the tensors."""
        window = tuple(self.arguments[_WINDOW])
        if _same(self.arguments, tensors.arguments(window, aux_data)):
            return _Call(self.kernel, window)
        return None


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
