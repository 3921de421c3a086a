"""Ways of saying a fact that are made up on the spot, so that no list of them is learned by heart.

A phrasing is an opening, then name, thing and kind in some order, then a verb. Pieces such as "the
{thing} of {name}" also occur in the unseen phrasings of ``kvloom.testbed.phrases``. No made-up phrasing
equals one of those or opens as one does; recall under them stays a test of whole sentences never seen.
"""

from __future__ import annotations

import random

OPENINGS = (
    "",
    "Well, ",
    "Here ",
    "I say that ",
    "He answered that ",
    "She knew that ",
    "They wrote that ",
    "As was said, ",
    "In short, ",
    "Listen: ",
    "# ",
    "- ",
    "* ",
    "> ",
    "Yes, ",
    "And so ",
    "After all, ",
    "It turned out that ",
    "One must know that ",
    "Look, ",
)
OWNED = (
    "{name}'s {thing}",
    "the {thing} of {name}",
    "the {thing} which {name} had",
    "that {thing} of {name}'s",
    "the {thing} {name} bought",
    "{name}, owner of the {thing},",
)
KINDS = ("the {kind}", "a {kind}", "the old {kind}", "one {kind}", "the full {kind}", "this {kind}")
OF = ("of", "on", "for", "with", "in", "behind", "from", "about")
VERBS = ("is", "was", "will be", "remains", "equals", "reads", "became", "is still", "->", "=", ":")
HAS = ("has", "had", "got", "shows", "needs", "holds", "opens with", "came with", "bore")
ASIDES = ("", "", "", " today", " now", " as before", " of course", ", they say,", " (again)")


def invent(rng: random.Random) -> str:
    """A phrasing with {name}, {thing} and {kind} that ends where the value stands."""
    opening, owned, kind = rng.choice(OPENINGS), rng.choice(OWNED), rng.choice(KINDS)
    aside = rng.choice(ASIDES)
    if rng.random() < 0.5:
        said = f"{kind} {rng.choice(OF)} {owned}{aside} {rng.choice(VERBS)}"
    else:
        tail = rng.choice((kind, f"{kind} {rng.choice(VERBS)}", ""))
        said = f"{owned}{aside} {rng.choice(HAS)} {tail}".rstrip()
    whole = f"{opening}{said}"
    return whole[0].upper() + whole[1:] if whole[0].islower() else whole
