"""A table of embeddings: parts, log, records, and the one who may write."""
