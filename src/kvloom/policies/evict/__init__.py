"""Scorers: one paper, one file."""
