"""Feed-forward of many experts over rows grouped by expert."""
