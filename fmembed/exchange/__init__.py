"""Vectors in and out of tables: files that other tools and people make, and take."""
