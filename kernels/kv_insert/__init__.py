"""KV latent: norm, RoPE, rounding and the write into its page at once."""
