"""FP8 and FP4 rounding and the weight formats of the checkpoint."""
