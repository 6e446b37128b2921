"""Benchmarks: ratios against a peer in the same run, in alternating rounds, because machines are noisy."""
