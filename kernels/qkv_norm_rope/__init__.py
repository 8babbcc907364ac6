"""Everything a layer does to q, kv and the indexer's q between projections and attention."""
