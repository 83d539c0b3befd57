"""A folder of images to a file of answers: progress on stderr, and a run that was interrupted goes on where it was.

Each answer is one line of JSON, written whole and at once, so the file itself is the record of what is done: a line
that was cut off by a crash is dropped and its image asked about again.

Run: python runtime/examples/batch_folder.py OUT IMAGES ANSWERS.jsonl QUESTION
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from qvlm_runtime import ImageError, Model, load

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def finished(answers: Path) -> set[str]:
    """Names of the images that have a whole line; cuts a broken last line off the file."""
    if not answers.exists():
        return set()
    lines = answers.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        with answers.open("r+b") as file:
            file.truncate(sum(map(len, lines)))
    return {json.loads(line)["image"] for line in lines}


def run(
    model: Model, images: Path, answers: Path, question: str, tell: Callable[[str], None]
) -> int:
    """Ask about every image that has no answer yet; the number of answers written."""
    done = finished(answers)
    waiting = sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES)
    waiting = [path for path in waiting if path.name not in done]
    with answers.open("ab", buffering=0) as file:
        for i, path in enumerate(waiting):
            record: dict[str, object] = {"image": path.name}
            try:
                answer = model.generate(question, [path], max_new_tokens=64)
                record |= {"answer": answer.text, "finish": answer.finish}
            except ImageError as error:  # one bad file does not end the night's work
                record["error"] = str(error)
            file.write(json.dumps(record).encode() + b"\n")
            tell(f"{len(done) + i + 1}/{len(done) + len(waiting)} {path.name}")
    return len(waiting)


if __name__ == "__main__":
    with load(sys.argv[1]) as opened:
        run(opened, Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4],
            lambda line: print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True))  # fmt: skip
        print(file=sys.stderr)
