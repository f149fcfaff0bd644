"""Names, in a module that imports nothing, for what pytest reads first."""

COMPRESSED_CALLS = ("masked", "folded", "sums of queries")
"""Ways to compute the compressed branch of a batch: backward in three forms. Forward skips tiles
in the last two."""
