"""Mergers: what happens to evicted entries."""
