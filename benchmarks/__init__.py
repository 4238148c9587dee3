"""Benchmarks: comparisons with other implementations, in alternating measurements, reported as ratios."""
