"""How evenly a step's sampling was spread over engines and time. Names: docs/metrics.md."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rlxf.core.types import Metrics, Rollouts


def tail_metrics(rollouts: Rollouts, *, num_engines: int, num_slots: int) -> Metrics:
    """Of a step's completions: the time in which engines ran empty, the longest one, and the busiest engine.

    Args:
        rollouts: of the whole step. Without ``ended_s`` there is no ``rollout/tail_s``; without ``engine`` all are of
            one engine.
        num_engines: engines that could have sampled.
        num_slots: completions that an engine decodes at the same time at most.
    """
    if not len(rollouts):
        return {}
    lengths = rollouts.sequences.completion_lengths.numpy()
    engine = torch.zeros(len(rollouts), dtype=torch.int64) if rollouts.engine is None else rollouts.engine
    num_engines = 1 if rollouts.engine is None else num_engines
    tokens = np.bincount(engine.numpy(), weights=lengths, minlength=num_engines)  # of each engine
    tail = {} if rollouts.ended_s is None else {"rollout/tail_s": tail_seconds(rollouts.ended_s, engine, num_slots)}
    return {
        **tail,
        "rollout/longest_over_mean": float(lengths.max() / max(lengths.mean(), 1e-9)),
        "rollout/imbalance": float(tokens.max() / max(tokens.mean(), 1e-9)),
    }


def tail_seconds(ended_s: Tensor, engine: Tensor, num_slots: int) -> float:
    """Seconds in which less than half of the slots were busy that the step used, over all engines together.

    An engine uses as many slots as it has completions, ``num_slots`` at most. Its slots are all busy until nothing
    waits any more; then each completion that ends leaves one empty.

    Args:
        ended_s: [B] seconds from the same moment for all engines.
        engine: [B] int64.
    """
    counts = engine.bincount()
    of_engines = torch.split(ended_s.double()[engine.argsort(stable=True)], counts.tolist())
    freed = torch.cat([ends.topk(min(num_slots, len(ends))).values for ends in of_engines]).sort().values
    # After the first i ends of n, n - i slots are busy: less than half of them once i is more than n / 2.
    return float(freed[-1] - freed[len(freed) // 2])
