"""HTML as text that cannot be confused with text: whatever is not `Html` is escaped."""

from __future__ import annotations

import html


class Html(str):
    """Finished HTML."""


def text(inside: str) -> Html:
    """A piece of text as HTML; HTML as it is."""
    return inside if isinstance(inside, Html) else Html(html.escape(inside))


def tag(name: str, /, *inside: str, **attributes: str | None) -> Html:
    """An element; `class_` and `data_x` are written `class` and `data-x`, None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{''.join(map(text, inside))}</{name}>")


def single(name: str, /, **attributes: str | None) -> Html:
    """An element without content."""
    return Html(tag(name, **attributes).removesuffix(f"</{name}>"))


def join(*parts: str) -> Html:
    return Html("\n".join(map(text, parts)))
