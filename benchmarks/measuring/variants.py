"""How many kernels this process has compiled or loaded, by compile function."""

import sys

PACKAGE = "nsa.fused.kernels"


def kernel_variants() -> dict[str, int]:
    """Kernel variants, FlashAttention-4's and our own, by compile function.

    Only modules that are already imported are looked at: an unused kernel has no variants.
    """
    counts = {}
    for module_name, module in sorted(sys.modules.items()):
        if not module_name.startswith(PACKAGE):
            continue
        for name, value in vars(module).items():
            # Count it where it is defined, not where it is imported.
            defined = getattr(value, "__module__", None) == module_name
            if defined and "compile" in name and hasattr(value, "cache_info"):
                count = value.cache_info().currsize
                if count:
                    counts[f"{module_name.removeprefix(f'{PACKAGE}.')}.{name}"] = count
    return counts
