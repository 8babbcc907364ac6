"""Index scores and their top-k in one step."""
