"""Inside an asyncio application: several questions at once, a limit on how many, a deadline for each.

Run: python runtime/examples/async_service.py OUT IMAGE QUESTION [QUESTION ...]
"""

import asyncio
import sys
from pathlib import Path

from qvlm_runtime import Model, load


class Service:
    """Answers on one model. ``at_once`` bounds memory: each answer has a cache of its own."""

    def __init__(self, model: Model, at_once: int = 2, seconds: float = 60.0) -> None:
        self._model = model
        self._turns = asyncio.Semaphore(at_once)
        self._seconds = seconds

    async def answer(self, question: str, image: bytes) -> str:
        """Cancelling the task that awaits this, or its deadline, stops the engine within one token."""
        async with self._turns:
            work = self._model.agenerate(question, [image], max_new_tokens=64)
            return (await asyncio.wait_for(work, self._seconds)).text


async def main(folder: str, image: str, questions: list[str]) -> None:
    """Ask all questions about one image; its features are computed once."""
    with load(folder) as model:
        service, picture = Service(model), Path(image).read_bytes()
        answers = await asyncio.gather(*(service.answer(q, picture) for q in questions))
        for question, answer in zip(questions, answers, strict=True):
            print(f"{question}\t{answer}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
