"""Our own CuTe DSL kernels, one operation a file; they share ``vectors`` and ``head_rows``.

Each file has the same ladder: a class for a kernel, a cached function that compiles it for a dtype
and static sizes, the function that allocates and launches, and ``compile_cases`` for a tool that
compiles everything on a machine without a GPU. Importing a file imports cutlass; importing this
package does not. ``fa4_sm90`` compiles and launches FlashAttention-4's kernels.
"""
