"""Rows of several streams through one collective; several lists of rows copied at once."""
