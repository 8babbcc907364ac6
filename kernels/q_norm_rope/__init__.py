"""Per-head query norm and RoPE."""
