"""KV latent: RMSNorm, RoPE and the official FP8 rounding."""
