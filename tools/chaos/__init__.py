"""Chaos: workers on real servers, everything killed at random, and proof that the count stays exact."""
