"""Errors a user can cause by what they load."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint (config or tensors) that cannot be used; the message names the thing and the file."""


class CapacityError(Exception):
    """Memory that is too small for what was asked; the message has the numbers."""
