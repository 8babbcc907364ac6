"""Rows to their experts' order and back."""
