"""Sampling from logits whose vocabulary is split over ranks."""
