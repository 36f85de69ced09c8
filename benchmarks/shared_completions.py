"""What it saves to compute a completion once for all of its pairs: reference and update with pairing=all.

    OMP_NUM_THREADS=1 python benchmarks/shared_completions.py       # -> results/shared_completions.json

Each of some prompts has n completions of lognormal lengths (mean 64 tokens), every two of which are a pair. The same
pairs are computed twice: as they are, and with identities that make every side of a pair a completion of its own. Both
take turns in one process, so that a slow machine slows both; CPU seconds are those of the process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, random_world, turns  # noqa: E402 - the root must be importable first
from benchmarks.packing import KINDS, fed  # noqa: E402
from benchmarks.sides import Ours, Work  # noqa: E402
from rlxf.core.types import (  # noqa: E402
    OnlinePairs,
    PairValues,
    PromptBatch,
    ReferencedPairs,
    Rollouts,
    ScoredRollouts,
    Sequences,
    Tokens,
)
from rlxf.pair import PAIRINGS, PairingSettings  # noqa: E402

SIZE = "2.5M"
NUM_SAMPLES = (2, 4, 8)
BUDGET = 2048  # tokens of a pass
WITH, WITHOUT = "with", "without"


def main() -> None:
    arguments = parse()
    os.environ.update(measure.environment())
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "prompts": arguments.prompts, "repeats": arguments.repeats, "budget": BUDGET, "model": SIZE, "samples": {},
        "machine": measure.machine(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        world = random_world.build(Path(scratch), SIZE)
        roles = Roles(world, arguments.prompts)
        for number in NUM_SAMPLES:
            pairs = all_pairs(arguments.prompts, number, world.shape.vocab)
            report["samples"][number] = compare(roles, pairs, arguments.repeats)
    turns.write_results(arguments.output, report, table(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "shared_completions.json")
    return parser.parse_args()


def all_pairs(num_prompts: int, num_samples: int, vocab: int) -> OnlinePairs:
    """Every two completions of each prompt. Prompts are of the lower half of the vocabulary, the rest of the upper."""
    draw = np.random.default_rng(num_samples)
    rows = num_prompts * num_samples
    lengths = np.clip(draw.lognormal(np.log(64) - 0.32, 0.8, rows).round(), 1, 256).astype(int)
    prompt_lengths = draw.integers(*random_world.PROMPT_LENGTHS, size=num_prompts, endpoint=True)
    prompts = [draw.integers(2, vocab // 2, size=length).tolist() for length in prompt_lengths]
    completions = [draw.integers(vocab // 2, vocab, size=length).tolist() for length in lengths]
    of_row = np.repeat(np.arange(num_prompts), num_samples)
    rollouts = Rollouts(
        prompts=PromptBatch(
            prompts=Tokens.from_rows(prompts),
            row_ids=torch.arange(num_prompts),
            positions=torch.arange(num_prompts),
            texts=("",) * num_prompts,
            columns={},
        ),
        sequences=Sequences.from_rows([prompts[p] for p in of_row], completions),
        prompt_index=torch.from_numpy(of_row),
        sample_index=torch.arange(num_samples).repeat(num_prompts),
        engine_logps=torch.full((int(lengths.sum()),), -6.0),
        policy_version=torch.zeros(rows, dtype=torch.int64),
    )
    scores = torch.from_numpy(draw.permutation(rows)).float()
    ends = torch.ones(rows, dtype=torch.bool)
    scored = ScoredRollouts(rollouts=rollouts, raw_scores=scores, scores=scores, contains_eos=ends)
    return PAIRINGS["all"](scored, PairingSettings()).pairs


def as_strangers(pairs: OnlinePairs) -> OnlinePairs:
    """The same pairs, as if no completion were in two of them."""
    number = len(pairs)
    rows = torch.arange(2 * number)
    return replace(pairs, prompt_index=rows[:number], chosen_rows=rows[:number], rejected_rows=rows[number:])


class Roles:
    """Actor and reference of a recipe, in this process."""

    def __init__(self, world: random_world.World, prompts: int) -> None:
        from rlxf.assembly.roles import build_actor, build_reference
        from rlxf.config.load import load_config
        from rlxf.platform import Process, get_platform

        roles = ("training", "actor_rollout", "ref", "reward")
        overrides: list[tuple[str, str, Any]] = [(role, "max_tokens_per_micro_batch", BUDGET) for role in roles]
        one_step = {"ppo_mini_batch_size": 10_000, "lr": 0.0}  # whose weights stay, so that both sides are equal
        overrides += [("actor_rollout", key, value) for key, value in one_step.items()]
        config = load_config(Ours(world=world, work=Work(prompts=prompts), overrides=tuple(overrides)).recipe())
        platform = get_platform("cpu")
        self.vocab = world.shape.vocab
        self.reference = build_reference(config, platform, Process())
        self.actor = build_actor(config, platform, Process())

    def step(self, pairs: OnlinePairs) -> tuple[dict[str, float], PairValues, float]:
        """CPU seconds of reference and update, the reference's answer, and the loss."""
        begin = time.process_time()
        reference = self.reference.logps(pairs)
        between = time.process_time()
        loss = self.actor.update(ReferencedPairs(pairs=pairs, reference=reference), 0)["loss"]
        end = time.process_time()
        return {"reference": between - begin, "update": end - between}, reference, loss


def compare(roles: Roles, pairs: OnlinePairs, repeats: int) -> dict[str, Any]:
    sides = {WITH: pairs, WITHOUT: as_strangers(pairs)}
    tokens, losses = {}, {}
    for name, side in sides.items():  # warms up, too
        with fed(roles.vocab) as counts:
            losses[name] = roles.step(side)[2]
        tokens[name] = sum(counts[kind] for kind in KINDS)
    assert abs(losses[WITH] - losses[WITHOUT]) < 1e-5, losses
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(repeats):
        for name in sorted(sides, reverse=bool(number % 2)):
            seconds[name].append(roles.step(sides[name])[0])
    ratios = {
        part: [b[part] / a[part] for a, b in zip(seconds[WITH], seconds[WITHOUT], strict=True)]
        for part in ("reference", "update")
    }
    return {
        "pairs": len(pairs),
        "tokens": tokens,
        "tokens_ratio": tokens[WITHOUT] / tokens[WITH],
        "cpu_s": seconds,
        **{f"{part}_ratio": spread(found) for part, found in ratios.items()},
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


def table(report: Mapping[str, Any]) -> Iterator[str]:
    """Ratios without / with: above 1, computing a completion once is cheaper."""
    yield "| n | pairs | tokens with | tokens without | ratio | CPU of the reference | CPU of the update |"
    yield "|---|---|---|---|---|---|---|"
    for number, found in report["samples"].items():
        parts = [
            f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['largest']:.2f})"
            for ratio in (found["reference_ratio"], found["update_ratio"])
        ]
        with_, without = (found["tokens"][name] for name in (WITH, WITHOUT))
        yield (
            f"| {number} | {found['pairs']} | {with_} | {without} | {found['tokens_ratio']:.2f} | {' | '.join(parts)} |"
        )


if __name__ == "__main__":
    main()
