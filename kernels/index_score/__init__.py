"""Indexer scores of queries against paged index entries."""
