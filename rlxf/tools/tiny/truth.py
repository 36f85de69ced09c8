"""Ground truth of the tiny world, for ``eval.metrics: rlxf.tools.tiny.truth``."""

from __future__ import annotations

from collections.abc import Sequence

from rlxf.tools.tiny.world import score, valid


def evaluate(
    prompts: Sequence[str], completions: Sequence[str], initial_completions: Sequence[str]
) -> dict[str, float]:
    """What the reward model can only guess, as shares of the completions.

    Args:
        prompts: one per completion; the truth of this world does not depend on them.
        completions: texts that the policy sampled.
        initial_completions: texts that the initial policy sampled for the same prompts.

    Returns:
        ``positive``: ground truth above 0; ``valid``: still in the grammar; ``win_truth``: better by ground truth than
        the initial policy's completion of the same prompt, ties half.
    """
    count = len(completions)
    if not count or len(prompts) != count or len(initial_completions) != count:
        raise ValueError(
            f"expected as many prompts and initial completions as completions, at least one; "
            f"got {len(prompts)}, {len(initial_completions)} and {count}"
        )
    scores = [score(text) for text in completions]
    wins = [_win(mine, score(text)) for mine, text in zip(scores, initial_completions, strict=True)]
    return {
        "positive": sum(value > 0 for value in scores) / count,
        "valid": sum(valid(text) for text in completions) / count,
        "win_truth": sum(wins) / count,
    }


def _win(mine: int, other: int) -> float:
    if mine == other:
        return 0.5
    return float(mine > other)
