"""Code that the benchmarks share: inputs, the accuracy gate, timing, stages, work, tables."""
