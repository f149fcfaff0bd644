"""Benchmarks under pytest, and tests of the scripts in benchmarks/."""
