"""Benchmarks: each prints its own figures, side by side with its peers in one run. None is a test of time."""
