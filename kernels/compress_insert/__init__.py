"""Compressed entries pooled and written into their pages at once."""
