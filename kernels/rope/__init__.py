"""Rotary position embedding on the last dimensions of each row."""
