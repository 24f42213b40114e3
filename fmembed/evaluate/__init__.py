"""Probes on a table, and the report."""
