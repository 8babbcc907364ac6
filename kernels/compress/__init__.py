"""Compressor: per-token rows and pooled entries."""
