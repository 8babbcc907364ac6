"""Counter-based Gumbel noise for sampling."""
