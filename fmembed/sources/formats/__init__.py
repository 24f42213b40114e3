"""Each format of a source: its suffixes, columns, shards and rows."""
