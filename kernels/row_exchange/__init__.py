"""Rows of several streams through one collective."""
