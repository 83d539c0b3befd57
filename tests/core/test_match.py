"""Proves when an answer counts as right: case, space, a period, several references, options by letter or text.

Run: python -m pytest tests/core/test_match.py
"""

from __future__ import annotations

import pytest

from qvlm.match import chosen, matches, normalise

OPTIONS = ("copper", "Iron ore", "a", "tin. ")


def test_normalise_folds_case_space_and_one_period() -> None:
    assert normalise("  A  Red\nsquare. ") == "a red square"
    assert normalise("3.5.") == "3.5" and normalise("..") == "."
    assert normalise("STRASSE") == normalise("straße")


@pytest.mark.parametrize("text", ["Yes", "yes.", " YES ", "y"])
def test_any_reference_is_right(text: str) -> None:
    assert matches(text, ("yes", "Y"))
    assert not matches(text, ("no",))


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("B", 1),
        ("b.", 1),
        ("(B)", 1),
        ("B. iron ore", 1),
        ("(b) because it is", 1),
        ("B: anything", 1),
        ("B) iron", 1),
        ("iron ORE.", 1),
        ("Tin", 3),
        ("a", 2),  # an option's text before a letter
        ("A.", 2),
        ("A: copper", 0),
        ("E", None),  # no fifth option
        ("copper and iron", None),
        ("by heating", None),
        ("A red one", None),
        ("", None),
    ],
)
def test_options_are_chosen_by_letter_or_text(text: str, option: int | None) -> None:
    assert chosen(text, OPTIONS) == option


def test_with_options_the_choice_counts() -> None:
    assert matches("(B) iron", ("B",), OPTIONS)
    assert matches("Iron ore", ("B",), OPTIONS)
    assert matches("b", ("iron ore",), OPTIONS)
    assert not matches("copper", ("B",), OPTIONS)
    # Equal texts that name no option are no right answer.
    assert not matches("none", ("none",), OPTIONS)
