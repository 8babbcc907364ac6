"""Attention over a window and paged compressed entries."""
