"""When an answer counts as right: the one definition that the evaluator, ``compare`` and the exporter's report share.

1. Text is compared after folding case, collapsing white space and dropping a trailing period.
2. An answer is right if it equals any accepted reference (benchmarks such as TextVQA and DocVQA list several).
3. With options (a letter each, A first) the choice counts: an answer that is or begins with an option's letter ("B",
   "(B)", "B.", "B. copper", "B: copper") or equals an option's text chose that option, and it is right if the
   reference chose the same one.

This is equality, not the soft vote of the VQA benchmarks. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Options have one letter each.
MOST_OPTIONS = 26
# A letter that stands for an option: alone, in brackets, or before a mark and the rest.
_LETTER = re.compile(r"\(([a-z])\)(?:\s|$)|([a-z])(?:[.:)](?:\s|$)|$)")


def normalise(text: str) -> str:
    """Case folded, white space collapsed, one trailing period dropped."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def chosen(text: str, options: Sequence[str]) -> int | None:
    """The option an answer names, by letter or by its whole text; None if it names none."""
    found = normalise(text)
    whole = [normalise(option) for option in options]
    # An option whose text is a letter ("a", "b" as names in a picture) is meant before the letter is.
    if found in whole:
        return whole.index(found)
    letter = _LETTER.match(found)
    if letter is None:
        return None
    index = ord(letter[1] or letter[2]) - ord("a")
    return index if index < len(options) else None


def matches(text: str, references: Sequence[str], options: Sequence[str] = ()) -> bool:
    """True if ``text`` is right by the rules above."""
    if options:
        choice = chosen(text, options)
        return choice is not None and choice in {chosen(r, options) for r in references}
    return normalise(text) in {normalise(reference) for reference in references}
