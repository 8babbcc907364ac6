"""Manifold-constrained hyper-connections: collapse, mix and head."""
