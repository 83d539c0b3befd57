"""What changes logits before a token is drawn, each a pure function of arrays that works in place.

repetition   of each token seen in the prompt or the answer: l > 0 -> l / penalty, else l * penalty
             (Keskar et al., CTRL, 2019; as transformers)
presence     minus the penalty for each token that the answer holds (as OpenAI's API)
frequency    minus the penalty times how often the answer holds it (as OpenAI's API)
bias         plus a number per token
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]


def repetition(logits: Logits, seen: Ids, penalty: float) -> None:
    """Divide the positive and multiply the negative logits of ``seen``, ids without repeats."""
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)


def counted(logits: Logits, counts: Mapping[int, int], presence: float, frequency: float) -> None:
    """Subtract the presence and the frequency penalty of the answer's tokens."""
    for token, count in counts.items():
        logits[token] -= presence + frequency * count


def bias(logits: Logits, amounts: Mapping[int, float]) -> None:
    """Add a number to each named token."""
    for token, amount in amounts.items():
        logits[token] += amount
