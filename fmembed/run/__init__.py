"""The driver of a run: what is left, where it goes, what is committed."""
