"""Attention over compressed entries: the definition (`reference`) and the fast paths (`ops`)."""
