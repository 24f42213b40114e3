"""Pieces to vectors. The only room with torch."""
