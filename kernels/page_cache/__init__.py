"""Entries in paged pools: store, load, round."""
