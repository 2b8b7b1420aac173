"""Measure the demo model on held-out scenes, in this process or through a running server.

``python -m examples.demo_model.evaluate --local models/demo`` or
``python -m examples.demo_model.evaluate --url http://127.0.0.1:8000`` prints one row per kind of
question; an answer is right when it is the expected sentence, letter by letter. The exit status is
1 when a target is missed.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from .answerers import Answerer, LocalAnswerer, ServerAnswerer
from .held_out import KINDS, make_questions

TARGETS = {
    "colour": 0.97, "shape": 0.97, "position": 0.95, "count": 0.95, "which_picture": 0.90,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class KindResult:
    """How one kind of question went; ``mistakes`` are (question, expected, answered)."""

    kind: str
    num_asked: int
    mistakes: tuple[tuple[str, str, str], ...]

    @property
    def accuracy(self) -> float:
        """Return the part of right answers."""
        return 1 - len(self.mistakes) / self.num_asked

    @property
    def misses_target(self) -> bool:
        """Tell whether a target is set for this kind and not reached."""
        return self.accuracy < TARGETS.get(self.kind, 0.0)


def measure(
    answerer: Answerer, kinds: Sequence[str], num_per_kind: int, seed: int, num_parallel: int = 1
) -> list[KindResult]:
    """Put held-out questions and compare the answers.

    Args:
        answerer: Who answers; called from ``num_parallel`` threads.
        kinds: Keys of ``KINDS``.
        num_per_kind: Questions of each kind.
        seed: Seed of the questions.
        num_parallel: Questions under way at a time.

    Returns:
        One result per kind, in order.
    """
    results = []
    with ThreadPoolExecutor(num_parallel) as pool:
        for kind in kinds:
            questions = make_questions(kind, num_per_kind, seed)
            answers = pool.map(answerer.answer, questions)
            mistakes = tuple(
                (question.turn.question, question.turn.answer, answer)
                for question, answer in zip(questions, answers, strict=True)
                if answer != question.turn.answer
            )
            results.append(KindResult(kind, num_per_kind, mistakes))
    return results


def format_table(results: Sequence[KindResult]) -> str:
    """Lay the results out as a table in Markdown."""
    lines = ["| question | asked | right | target |", "|---|---:|---:|---:|"]
    for result in results:
        target = f"{TARGETS[result.kind]:.0%}" if result.kind in TARGETS else ""
        mark = " missed" if result.misses_target else ""
        lines.append(
            f"| {result.kind} | {result.num_asked} | {result.accuracy:.1%} | {target}{mark} |"
        )
    return "\n".join(lines)


def format_mistakes(results: Sequence[KindResult], most: int) -> str:
    """List up to ``most`` wrong answers of every kind."""
    return "\n".join(
        f"{result.kind}: {question!r} expected {expected!r} answered {answer!r}"
        for result in results
        for question, expected, answer in result.mistakes[:most]
    )


def main() -> int:
    """Parse the command line, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", help="Address of a running server.")
    source.add_argument("--local", type=Path, help="Folder of a checkpoint.")
    parser.add_argument("--api-key", help="Bearer token for the server.")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--num", type=int, default=100, help="Questions of each kind.")
    parser.add_argument("--seed", type=int, default=2, help="Seed of the questions.")
    parser.add_argument("--parallel", type=int, default=4, help="Requests under way at a time.")
    parser.add_argument(
        "--bfloat16", action="store_true", help="With --local: compute in bfloat16."
    )
    parser.add_argument("--mistakes", type=int, default=0, help="Wrong answers to list per kind.")
    options = parser.parse_args()
    answerer: Answerer
    num_parallel = 1
    if options.url:
        answerer, num_parallel = ServerAnswerer(options.url, options.api_key), options.parallel
    else:
        dtype = torch.bfloat16 if options.bfloat16 else torch.float32
        answerer = LocalAnswerer(options.local, dtype)
    results = measure(answerer, options.kinds, options.num, options.seed, num_parallel)
    sys.stdout.write(format_table(results) + "\n")
    if options.mistakes:
        sys.stdout.write(format_mistakes(results, options.mistakes) + "\n")
    return int(any(result.misses_target for result in results))


if __name__ == "__main__":
    sys.exit(main())
