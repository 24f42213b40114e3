"""Rows to pieces: what the model takes, made on CPUs."""
