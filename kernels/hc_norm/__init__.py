"""Streams collapsed, normed and rounded to FP8 at once."""
