"""Compiled kernels, FA4's and ours: once in a process, and kept on disk for those after it.

They lie where quack-kernels keeps its own: QUACK_CACHE_DIR, by default quack_cache in the user's
folder of temporary files. QUACK_CACHE_ENABLED=0 keeps none, and neither does a user who has no such
folder. A kernel is compiled again when this package, FlashAttention-4, the CuTe DSL, Python, the
kind of GPU or a variable CUTE_DSL_* is another.
"""

import functools
import hashlib
import logging
import os
from collections.abc import Callable
from getpass import getuser
from pathlib import Path
from tempfile import gettempdir

import cutlass.cute as cute

from nsa import recordings
from nsa.fused.kernels.hopper import FA4_SOURCES, get_compile_target_capacity, jit_cache

# Whose sources a kernel is made of, beside quack's, which the cache knows.
_SOURCES = (Path(__file__).parents[2], FA4_SOURCES)

_logger = logging.getLogger("nsa")


def compile_kernel(kernel, *arguments):
    """Compile ``kernel(*arguments, stream)``; the stream is the current one of PyTorch."""
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(kernel, *arguments, stream, options="--enable-tvm-ffi")


def kept(function: Callable) -> Callable:
    """Decorate a function that compiles a kernel; its arguments are hashable and can be pickled."""

    def compile_new(_sources, _target, *arguments):
        return function(*arguments)

    # The cache goes by this name and the arguments.
    compile_new.__qualname__ = f"{function.__module__}.{function.__qualname__}"
    on_disk = jit_cache(compile_new)

    @functools.lru_cache(maxsize=None)
    @functools.wraps(function)
    def compiled(*arguments):
        if not _keeps_kernels():
            kernel = function(*arguments)
        else:
            kernel = on_disk(_fingerprint(), get_compile_target_capacity(), *arguments)
        # A new kernel wraps the function that a later process loads, for keywords that none has.
        if hasattr(kernel, "__tvm_ffi_object__"):
            kernel = kernel.__tvm_ffi_object__()
        return functools.partial(recordings.launch, kernel)

    return compiled


@functools.cache
def _keeps_kernels() -> bool:
    """Whether there is a folder for kernels, or can be."""
    try:
        default = Path(gettempdir()) / getuser() / "quack_cache"
        folder = Path(os.environ.get("QUACK_CACHE_DIR") or default)
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except (OSError, KeyError):  # KeyError: a user without a name
        usable = False
    if not usable:
        _logger.warning("compiled kernels are not kept on disk: set QUACK_CACHE_DIR to a folder")
    return usable


@functools.lru_cache(maxsize=None)
def _fingerprint() -> str:
    """What changes with any source of ``_SOURCES``, and with what the DSL compiles by."""
    settings = sorted(pair for pair in os.environ.items() if pair[0].startswith("CUTE_DSL_"))
    digest = hashlib.sha256(repr(settings).encode())
    for root in _SOURCES:
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
