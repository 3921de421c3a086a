"""Measuring caches: rows of evidence, texts, measures, tables and figures.

`compare` turns cells into rows (`results`), which a `ledger` keeps; `table` and `figures` are made from
rows and from nothing else. `measure` and `needles` take the measurements, through the `decoders`.
"""
