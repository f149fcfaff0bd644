"""Numbers of the GPU that the kernels and their layouts are written for. This file has no imports.

The numbers of wgmma, Hopper's matrix instruction, are for its 16-bit forms.
"""

WARP = 32
"""Threads that execute an instruction together."""

WARPGROUP = 128
"""Threads that execute a wgmma together: four warps."""

WGMMA_ROWS = 64
"""Rows of a wgmma."""

WARP_ROWS = 16
"""Rows of a wgmma whose results one warp of the warpgroup holds."""

QUAD = 4
"""Neighbouring threads that hold one result row of a wgmma: each has two columns of every eight."""

SHARED_BYTES = 227 * 1024
"""Shared memory that a CTA may use on Hopper. An SM has 1 KiB more, which the hardware uses."""

LOG2_E = 1.4426950408889634
"""log2(e): the GPU has an instruction for powers of two and none for powers of e."""
