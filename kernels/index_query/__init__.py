"""Indexer query: RoPE, Hadamard rotation, FP4 rounding."""
