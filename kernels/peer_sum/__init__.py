"""Sums of small tensors over ranks that can write each other's memory."""
