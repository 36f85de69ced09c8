"""Which tokens actor, reference and reward model compute: padding, prompts computed twice, rows of the head.

    python benchmarks/packing.py                       # -> results/packing.json

Pairs whose completions have lognormal lengths (sigma 0.8, mean 64, at most 256) after prompts of 16 to 64 tokens.
Prompts, completions and padding consist of different tokens, so the script can count each kind in the input of every
forward pass. Nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, random_world, turns  # noqa: E402 - the root must be importable first
from benchmarks.sides import Ours, Work  # noqa: E402
from rlxf.core.types import Pairs, PairValues, PromptBatch, ReferencedPairs, Rollouts, Sequences, Tokens  # noqa: E402

SIZE = "2.5M"
SETTINGS: dict[str, dict[str, Any]] = {
    "micro-batches of 8 pairs": {},
    "micro-batches of 8 pairs, every prompt twice": {"share_prompts": False},
    "micro-batches of 1024 tokens": {"max_tokens_per_micro_batch": 1024},
}


def main() -> None:
    arguments = parse()
    os.environ.update(measure.environment())
    torch.set_num_threads(1)
    work = Work(workloads=("lognormal",), prompts=arguments.pairs)
    report: dict[str, Any] = {"pairs": arguments.pairs, "settings": {}, "machine": measure.machine()}
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        world = random_world.build(Path(scratch), SIZE)
        chosen, rejected = (sequences(work, side, world.shape.vocab) for side in (0, 1))
        report["padded_to_the_longest"] = padded_to_the_longest(chosen, rejected)
        for name, changes in SETTINGS.items():
            overrides = [("training", key, value) for key, value in changes.items()]
            overrides += [(role, "micro_batch_size", 8) for role in ("actor_rollout", "ref", "reward")]
            side = Ours(world=world, work=work, overrides=tuple(overrides))
            report["settings"][name] = count(side, chosen, rejected)
    turns.write_results(arguments.output, report, table(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "packing.json")
    return parser.parse_args()


def sequences(work: Work, side: int, vocab: int) -> Sequences:
    """One side of all pairs: prompts from the lower half of the vocabulary, completions from the upper one."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(*random_world.PROMPT_LENGTHS, size=work.prompts, endpoint=True)
    prompts = [draw.integers(2, vocab // 2, size=length).tolist() for length in lengths]
    completions = [draw.integers(vocab // 2, vocab, size=length).tolist() for length in work.lengths(0)[:, side]]
    return Sequences.from_rows(prompts, completions)


def count(side: Ours, chosen: Sequences, rejected: Sequences) -> dict[str, Any]:
    """For each role: the tokens that its model computed, against those that the pairs hold."""
    from rlxf.assembly.roles import build_actor, build_reference, build_scorer
    from rlxf.config.load import load_config
    from rlxf.platform import Process, get_platform

    config = load_config(side.recipe())
    platform = get_platform("cpu")
    pairs = Pairs(chosen=chosen, rejected=rejected)
    none = PairValues(chosen=torch.zeros(len(pairs)), rejected=torch.zeros(len(pairs)))
    vocab = side.world.shape.vocab
    with fed(vocab) as reference:
        build_reference(config, platform, Process()).logps(pairs)
    with fed(vocab) as reward:
        build_scorer(config, platform, Process()).score(rollouts(chosen, rejected))
    with fed(vocab) as actor:
        build_actor(config, platform, Process()).update(ReferencedPairs(pairs=pairs, reference=none), 0)
    responses = int(chosen.completion_lengths.sum() + rejected.completion_lengths.sum())
    prompts = int(chosen.prompt_lengths.sum())
    return {
        role: {
            **found,
            "padding_efficiency": (found["prompt"] + found["completion"]) / sum(found[k] for k in KINDS),
            "prompt_tokens_per_pair_over_P": found["prompt"] / prompts,
            "completion_tokens_over_R": found["completion"] / responses,
            "head_rows_over_response_tokens": found["rows"] / responses,
        }
        for role, found in (("actor", actor), ("reference", reference), ("reward", reward))
    }


KINDS = ("prompt", "completion", "padding")


@contextmanager
def fed(vocab: int) -> Iterator[dict[str, int]]:
    """Counts of the tokens of every forward pass inside the block, and of the rows that the head reads."""
    from rlxf.platform import get_platform

    get_platform("cpu").prepare_megatron()
    from rlxf.models.megatron.model import HiddenStates

    counts = dict.fromkeys((*KINDS, "rows", "passes"), 0)
    forward = HiddenStates.forward

    def counting(self: HiddenStates, packed: Any) -> Any:
        tokens = packed.tokens
        counts["prompt"] += int(((tokens > random_world.PAD) & (tokens < vocab // 2)).sum())
        counts["completion"] += int((tokens >= vocab // 2).sum())
        counts["padding"] += int((tokens == random_world.PAD).sum())
        counts["rows"] += packed.rows.numel()
        counts["passes"] += 1
        return forward(self, packed)

    HiddenStates.forward = counting  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        HiddenStates.forward = forward  # type: ignore[method-assign]


def rollouts(chosen: Sequences, rejected: Sequences) -> Rollouts:
    """The same completions as a reward model gets them: row ``2 p + k``."""
    rows = torch.arange(2 * len(chosen)).view(2, -1).t().flatten()
    both = Sequences.concat([chosen, rejected]).select(rows)
    prompts = PromptBatch(
        prompts=Tokens.from_rows(chosen.prompt_rows()),
        row_ids=torch.arange(len(chosen)),
        positions=torch.arange(len(chosen)),
        texts=("",) * len(chosen),
        columns={},
    )
    return Rollouts(
        prompts=prompts,
        sequences=both,
        prompt_index=torch.arange(len(chosen)).repeat_interleave(2),
        sample_index=torch.arange(2).repeat(len(chosen)),
        engine_logps=torch.zeros(int(both.completion_lengths.sum())),
        policy_version=torch.zeros(2 * len(chosen), dtype=torch.int64),
    )


def padded_to_the_longest(chosen: Sequences, rejected: Sequences, pairs: int = 8) -> dict[str, float]:
    """For comparison, by formula: prompts padded on the left and completions on the right, 8 pairs at a time."""
    real, computed = 0, 0
    for start in range(0, len(chosen), pairs):
        rows = torch.arange(start, min(start + pairs, len(chosen)))
        part = Sequences.concat([chosen.select(rows), rejected.select(rows)])
        real += int(part.lengths.sum())
        computed += len(part) * int(part.prompt_lengths.max() + part.completion_lengths.max())
    return {"padding_efficiency": real / computed, "prompt_tokens_per_pair_over_P": 2.0}


def table(report: Mapping[str, Any]) -> Iterator[str]:
    names = (
        "padding_efficiency",
        "prompt_tokens_per_pair_over_P",
        "completion_tokens_over_R",
        "head_rows_over_response_tokens",
        "passes",
    )
    yield "| setting | role | " + " | ".join(names).replace("_", " ") + " |"
    yield "|---" * (2 + len(names)) + "|"
    for setting, roles in report["settings"].items():
        for role, found in roles.items():
            yield f"| {setting} | {role} | " + " | ".join(f"{found[name]:.4g}" for name in names) + " |"
    padded = report["padded_to_the_longest"]
    yield f"| padded to the longest, 8 pairs | any | {padded['padding_efficiency']:.4g} | 2 | | | |"


if __name__ == "__main__":
    main()
