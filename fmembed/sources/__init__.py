"""A dataset: found, cut into shards, read into canonical rows."""
