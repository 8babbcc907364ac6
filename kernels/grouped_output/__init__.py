"""Inverse RoPE and the grouped output projection."""
