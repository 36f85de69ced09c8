"""Rules on what a run can show: its evaluation set, and how often it reads its data."""

from __future__ import annotations

import math

from rlxf.health.curves import RunCurves
from rlxf.health.thresholds import limit

WINS, WINS_ERROR = "eval/win_rate", "eval/win_rate_se"
REWARD, REWARD_ERROR = "eval/reward", "eval/reward_se"


def evaluation_too_small(run: RunCurves) -> str | None:
    if not run.facts.online:
        return None
    prompts, wins, error = run.facts.num_eval_prompts, run.evaluations.newest(WINS), run.evaluations.newest(WINS_ERROR)
    if 0 < prompts <= limit("evaluation_too_small", "prompts") and run.evaluations.num_rows > 1:
        width = 1 / math.sqrt(prompts)
        return f"{prompts} prompts: a win rate between {0.5 - width:.2f} and {0.5 + width:.2f} may be chance"
    last = run.facts.num_steps and run.evaluations.step >= run.facts.num_steps
    within = abs(wins - 0.5) <= limit("evaluation_too_small", "errors") * error
    if not (last and within and error >= limit("evaluation_too_small", "error")):
        return None
    return f"after the last step the win rate is {wins:.3f} ± {error:.3f}: no difference to the start is shown"


def data_repeated(run: RunCurves) -> str | None:
    """Online each epoch has new completions, so prompts may come again."""
    if run.facts.online:
        return None
    epochs = run.steps.newest("epoch")
    most = limit("data_repeated", "sft" if run.facts.stage == "sft" else "preferences")
    return f"the run is in epoch {epochs:.1f}" if epochs > most else None
