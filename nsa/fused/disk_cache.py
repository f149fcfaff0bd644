"""Where compiled kernels are kept on disk, and where they cannot be.

FlashAttention-4 reads a variable when it is imported, so whoever imports it first decides. Modules
that import it, and our kernels do, are imported here.
"""

import importlib
import logging
import os
from functools import cache
from getpass import getuser
from pathlib import Path
from tempfile import gettempdir
from types import ModuleType

FA4_ENABLED = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
_FA4_FOLDER, _OUR_FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "QUACK_CACHE_DIR"

_logger = logging.getLogger("nsa")


def import_kernels(name: str) -> ModuleType:
    """Import a module of kernels, with FlashAttention-4 set to keep its own on disk if it can.

    An environment that says whether it does is left as it is.
    """
    given = os.environ.get(FA4_ENABLED)
    if given is None and is_usable(_FA4_FOLDER, "flash_attention_cute_dsl_cache"):
        os.environ[FA4_ENABLED] = "1"
    try:
        return importlib.import_module(name)
    finally:
        if given is None:
            os.environ.pop(FA4_ENABLED, None)


def keeps_ours() -> bool:
    """Whether there is a folder for our kernels, that of quack-kernels."""
    return is_usable(_OUR_FOLDER, "quack_cache")


@cache
def is_usable(variable: str, name: str) -> bool:
    """Whether the folder that ``variable`` names, or the user's default one, can be written to."""
    try:
        folder = Path(os.environ.get(variable) or Path(gettempdir()) / getuser() / name)
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except (OSError, KeyError):  # KeyError: a user without a name
        usable = False
    if not usable:
        _logger.warning("compiled kernels are not kept on disk: set %s to a folder", variable)
    return usable
