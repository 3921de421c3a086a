"""What the scripts that fill pages share."""

from __future__ import annotations


def filled(page: str, tables: dict[str, str]) -> str:
    """A page with what is between `<!-- NAME -->` and `<!-- end -->` made anew."""
    for name, table in tables.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->\n")
        assert mark and end, f"the page has no place for {name}"
        page = f"{before}{mark}\n{table}\n\n{end}{after}"
    return page
