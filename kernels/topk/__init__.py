"""Deterministic top-k selection and merge."""
