"""Numbers of the GPU that the kernels, and what lays their work out, are written for. No imports.

Those of Hopper's matrix instruction, wgmma, are of its 16-bit forms.
"""

WARP = 32
"""Threads that execute an instruction together."""

WARPGROUP = 128
"""Threads that execute a wgmma together: four warps."""

WGMMA_ROWS = 64
"""Rows of a wgmma."""

WARP_ROWS = 16
"""Rows of a wgmma whose results a warp of the warpgroup holds."""

QUAD = 4
"""Neighbouring threads that hold the results of a row of a wgmma, two columns of each eight."""

SHARED_BYTES = 227 * 1024
"""Shared memory that a CTA may have on Hopper. An SM has 1 KiB more, which the hardware takes."""

LOG2_E = 1.4426950408889634
"""log2(e): the GPU has an instruction for powers of two and none for powers of e."""
