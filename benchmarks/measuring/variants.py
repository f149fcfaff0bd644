"""How many kernels this process has compiled or loaded, by compile function."""

import sys


def kernel_variants() -> dict[str, int]:
    """Kernel variants of FlashAttention-4 and of our own, by compile function.

    Only modules that are already imported are looked at: an unused kernel has no variants.
    """
    counts = {}
    for module_name, module in sorted(sys.modules.items()):
        if module_name.startswith("flash_attn.cute"):
            size = _fa4_cache_size
        elif module_name.startswith("nsa.fused.kernels"):
            size = _own_cache_size
        else:
            continue
        for name, value in vars(module).items():
            # Count it where it is defined, not where it is imported.
            if getattr(value, "__module__", None) == module_name and (count := size(name, value)):
                counts[f"{module_name.removeprefix('nsa.fused.kernels.')}.{name}"] = count
    return counts


def _fa4_cache_size(_name: str, value) -> int:
    cache = getattr(value, "compile_cache", {})
    # FA4's JITCache holds a dict; some functions have a plain one.
    return len(getattr(cache, "cache", cache))


def _own_cache_size(name: str, value) -> int:
    if "compile" in name and hasattr(value, "cache_info"):
        return value.cache_info().currsize
    return 0
