"""The host layer: the only room that imports transformers."""
