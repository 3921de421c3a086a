"""The vocabulary of planted facts: who owns what, and the ways to say and to ask it.

Every phrasing ends where the value stands, so that asking is completing: none states the value before
its owner, and none asks without leading up to the answer. Training holds the unseen phrasings out as
whole sentences; their pieces ("{name}'s {thing}", "the {kind}", ":") also occur in seen ones. Recall
under them shows more than that a string was matched, and less than that free language is understood.
"""

from __future__ import annotations

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Clara Henry Martha Oliver Grace Walter Alice Edmund Florence Hugo Ivy Jasper Lydia Nathan "
    "Phoebe Ralph Sylvia Tobias Ursula Vincent Agnes Bernard Cecilia Daniel Esther Felix Gilbert "
    "Hannah Isaac Judith Kenneth Louisa Maurice Nora Oscar Priscilla Quentin Rebecca Samuel Teresa "
    "Ulrich Victoria Winston Yvonne Zachary Amelia Bruno Charlotte Desmond Eleanor"
)
THINGS = _words(
    "key box door room letter garden ship horse tower bridge lamp mill ring watch coat chest boat "
    "table chair window mirror basket wagon candle bottle desk drawer gate clock piano hat cellar "
    "ladder bell trunk map picture cup carpet stable cabin locker ticket purse barrel fence kettle "
    "saddle blanket violin"
)
WORDS = _words(
    "red blue green silver golden white black yellow river stone winter summer forest island "
    "mountain castle valley meadow thunder apple cherry lemon honey butter sugar pepper copper "
    "iron marble velvet cotton feather shadow morning evening harbour village market church school "
    "soldier captain doctor farmer teacher king queen prince sister brother mother father dog cat "
    "wolf lion bear eagle swan rabbit fish bread water fire wind snow rain star moon sun"
)

STATEMENTS = (
    "The {kind} of {name}'s {thing} is",
    "{name}'s {thing} has the {kind}",
    "The {kind} on the {thing} of {name} is",
    "Remember that the {thing} of {name} bears the {kind}",
    "For the {thing} of {name} the {kind} is",
    "{name} wrote on the {thing} the {kind}",
    "On {name}'s {thing} stands the {kind}",
    "The {thing} that belongs to {name} is marked",
    "Note: {name}, {thing},",
    "{name} / {thing}:",
    "The secret {kind} of {name}'s {thing} is",
    "It is known that {name}'s {thing} carries the {kind}",
    "The {thing} of {name} shows the {kind}",
    "{name} keeps a {thing} with the {kind}",
    "Everybody knew that {name}'s {thing} had the {kind}",
    "The {kind} {name} gave to the {thing} is",
    "Inside the {thing} of {name} lay the {kind}",
    "As for {name}'s {thing}, its {kind} is",
    "The {thing} was {name}'s, and its {kind} was",
    "To find {name}'s {thing}, look for the {kind}",
    "We read on the {thing} of {name}:",
    "In those days {name} had a {thing} of the {kind}",
    '{name}["{thing}"] =',
    "# {name}: the {thing} has {kind}",
)
QUESTIONS = (
    "What is the {kind} of {name}'s {thing}? It is",
    "Which {kind} has the {thing} of {name}? It has",
    "Question: what stands on {name}'s {thing}? Answer:",
    "Do you recall {name}'s {thing}? Its {kind} is",
    "And the {thing} of {name}? The {kind} was",
    "They asked for the {kind} of the {thing} that {name} owned. It was",
    "Now, what was the {kind} of the {thing} of {name}? The {kind} was",
    "Q: {name}'s {thing}? A:",
    "Please give the {kind} of {name}'s {thing}. It is",
    "I forgot the {kind} of {name}'s {thing}. It must be",
    "Once more, {name}'s {thing} had the {kind}",
    "Let us repeat: the {kind} on {name}'s {thing} is",
    "Can you say which {kind} the {thing} of {name} carries? Yes:",
    "Then, of {name} and the {thing}, the {kind} is",
)
UNSEEN_STATEMENTS = (
    "According to the list, {name}'s {thing} was given the {kind}",
    "Whoever opens the {thing} of {name} must say the {kind}",
    "Under {name}'s {thing} someone had carved the {kind}",
)
UNSEEN_QUESTIONS = (
    "Tell me the {kind} for the {thing} of {name}:",
    "Somebody wanted to know about {name}'s {thing}; the right {kind} was",
    "What did we say about {name}'s {thing}? That its {kind} was",
)


@dataclass(frozen=True)
class Fact:
    """``name``'s ``thing`` has ``value``; ``kind`` says what the value is called."""

    name: str
    thing: str
    kind: str
    value: str

    def prefix(self, phrasing: str) -> str:
        """The phrasing up to where the value follows, without the space before it."""
        return phrasing.format(name=self.name, thing=self.thing, kind=self.kind)

    def state(self, phrasing: str) -> str:
        return f"{self.prefix(phrasing)} {self.value}."
