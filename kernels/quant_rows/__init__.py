"""Rows in FP8 with power-of-two scales, made once and read by many products."""
