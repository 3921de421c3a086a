"""The report of experiments: figures, tables, one HTML page and a LaTeX text, from rows and nothing else.

`kinds/` has one file per kind of figure; `build` reads folders and writes everything.
"""
