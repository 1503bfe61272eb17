"""Texts to tokens on all cores, kept in shards, and written as the splits of prepared data."""
