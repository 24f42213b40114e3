"""A model's folder: what it says of itself, read and checked without torch."""
