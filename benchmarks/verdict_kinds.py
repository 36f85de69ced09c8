"""The runs of ``verdicts.py``: what is done to each, and the verdicts that are expected of it.

The expectations were written down before a rule was asked about a run. They do not depend on what rules say: where a
kind of run does not always break, the ground truth of the tiny world, which no rule reads, tells whether it did.
"""

from __future__ import annotations

from dataclasses import dataclass

ONLINE, OFFLINE = "online_dpo_trainer_tiny", "offline_dpo_trainer_tiny"
PRAISE = "great|wonderful|brilliant|charming|clever|moving|superb|delightful|fresh|lovely|funny|gripping"
BROKEN_BELOW = 0.6  # share of valid texts after the last step: a run with fewer has left the grammar

# Reward functions, by the name of the file that the benchmark writes; {rewards} in an override is its folder.
REWARDS = {
    "constant": "def reward(prompts, completions, completion_ids, **columns):\n    return [1.0] * len(completions)\n",
    "length": "def reward(prompts, completions, completion_ids, **columns):\n"
    "    return [float(len(ids)) for ids in completion_ids]\n",
    "brevity": "def reward(prompts, completions, completion_ids, **columns):\n"
    "    return [-float(len(ids)) for ids in completion_ids]\n",
    "noise": "from zlib import crc32\n\n\ndef reward(prompts, completions, completion_ids, **columns):\n"
    "    return [crc32(f'{a}{b}'.encode()) / 2**31 - 1.0 for a, b in zip(prompts, completions)]\n",
    "saturated": "from rlxf.tools.tiny.world import score\n\n\n"
    "def reward(prompts, completions, completion_ids, **columns):\n"
    "    return [float(score(text) > -2) for text in completions]\n",
    "slow": "from time import sleep\n\nfrom rlxf.tools.tiny.world import score\n\n\n"
    "def reward(prompts, completions, completion_ids, **columns):\n"
    "    sleep(1)\n"
    "    return [float(score(text)) for text in completions]\n",
    "binary": "from rlxf.tools.tiny.world import score\n\n\n"
    "def reward(prompts, completions, completion_ids, **columns):\n"
    "    return [float(score(text) > 0) for text in completions]\n",
    "praise": f"import re\n\n\ndef reward(prompts, completions, completion_ids, **columns):\n"
    f"    return [float(len(re.findall('{PRAISE}', text))) for text in completions]\n",
}

ANY = (
    *("over_optimised", "length_exploitation", "eos_lost", "collapsed", "useless_reward", "ties_rising"),
    *("reference_too_near", "reference_too_far", "rate_too_high", "staleness_hurts", "offline_collapse"),
)
FAR = ("over_optimised", "collapsed", "reference_too_far", "rate_too_high", "eos_lost", "length_exploitation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """Runs that differ in their seed alone."""

    name: str
    what: str  # for the table
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1, 2, 3)
    recipe: str = ONLINE
    steps: int = 60
    must: tuple[str, ...] = ()  # verdicts that each run has to raise
    if_broken: tuple[str, ...] = ()  # of which a run that has left the grammar has to raise one
    may: tuple[str, ...] = ()  # further ones that are no mistake
    stale: bool = False  # the engine gets no weights after the first push
    on_ray: bool = False  # each role has its own process; rules are asked as if each had a device of its own


def rate(first: float, last: float) -> tuple[str, str]:
    return f"actor_rollout.lr={first}", f"actor_rollout.min_lr={last}"


def function(name: str) -> str:
    return f"reward.function={{rewards}}/{name}.py"


LASTS = "algorithm.max_empty_steps=100"  # the run goes on where no prompt gives a pair
JUDGE = "judge.function=rlxf.tools.tiny.judge"
NEGATED = "reward.sources=[{load: ./models/tiny/rm, weight: -1.0}]"
RULE = f"reward.sources=[{{rule: regex, options: {{pattern: '{PRAISE}'}}}}]"

HEALTHY = (
    Kind(name="good", what="the quick start", seeds=tuple(range(1, 13)), steps=100),
    Kind(
        name="good_ahead", what="the quick start, `rollout.lookahead=1`", overrides=("rollout.lookahead=1",), steps=100
    ),
    Kind(name="good_slow", what="half its rate", overrides=rate(3e-4, 1e-4), steps=100),
    Kind(name="good_judge", what="with a judge beside the reward", overrides=(JUDGE,), seeds=(1, 2)),
    Kind(
        name="good_offline",
        what="offline DPO at a fifth of its rate",
        recipe=OFFLINE,
        steps=80,
        overrides=rate(1e-4, 1e-5),
    ),
    Kind(
        name="good_ray",
        what="the quick start on Ray, a process for each role",
        on_ray=True,
        seeds=(1, 2, 3),
        steps=30,
        overrides=("training.eval_interval=0",),
    ),
    Kind(name="good_sft", what="supervised fine-tuning", recipe="sft_trainer_tiny", seeds=(1,), steps=150),
    Kind(name="good_rm", what="a reward model", recipe="reward_trainer_tiny", seeds=(1,), steps=150),
)

BROKEN = (
    Kind(
        name="old_recipe",
        what="an earlier quick start: beta 0.1, rate 8e-4",
        seeds=tuple(range(1, 13)),
        steps=100,
        overrides=("actor_rollout.dpo_beta=0.1", *rate(8e-4, 5e-5)),
        if_broken=FAR,
        may=FAR,
    ),
    Kind(
        name="constant_rate",
        what="beta 0.1, rate 5e-4 to the end",
        steps=100,
        overrides=("actor_rollout.dpo_beta=0.1", "actor_rollout.lr_decay_style=constant", *rate(5e-4, 5e-4)),
        if_broken=FAR,
        may=FAR,
    ),
    Kind(name="rate_x3", what="rate x 3", overrides=rate(1.9e-3, 3e-4), seeds=(1, 2, 3, 4), if_broken=FAR, may=FAR),
    Kind(
        name="rate_x10",
        what="rate x 10",
        overrides=rate(6.2e-3, 1e-3),
        seeds=(1, 2, 3, 4),
        if_broken=("reference_too_far", "rate_too_high", "over_optimised"),
        may=ANY,
    ),
    Kind(name="rate_x30", what="rate x 30", overrides=rate(1.9e-2, 3e-3), must=("rate_too_high",), may=ANY),
    Kind(
        name="beta_tiny",
        what="beta 0.005, rate x 3",
        overrides=("actor_rollout.dpo_beta=0.005", *rate(1.9e-3, 3e-4)),
        must=("reference_too_far",),
        may=FAR,
    ),
    Kind(
        name="beta_huge",
        what="beta 20, a tenth of the rate",
        overrides=("actor_rollout.dpo_beta=20", *rate(6e-5, 1e-5)),
        must=("reference_too_near",),
        may=("rate_too_high",),
    ),
    Kind(
        name="negated", what="reward times -1, nothing to compare it with", overrides=(NEGATED,), if_broken=FAR, may=FAR
    ),
    Kind(
        name="negated_judge",
        what="reward times -1 beside a judge",
        overrides=(NEGATED, JUDGE),
        must=("useless_reward",),
    ),
    Kind(
        name="constant",
        what="the same reward for all",
        overrides=(function("constant"), LASTS),
        steps=10,
        must=("useless_reward",),
        may=("ties_rising",),
    ),
    Kind(
        name="length",
        what="length as the reward",
        overrides=(function("length"),),
        must=("length_exploitation",),
        may=(*FAR, "ties_rising", "useless_reward"),
    ),
    Kind(
        name="noise",
        what="noise as the reward",
        overrides=(function("noise"),),
        must=("useless_reward",),
        may=("rate_too_high", "reference_too_far"),
    ),
    Kind(
        name="noise_judge",
        what="noise as the reward, beside a judge",
        overrides=(function("noise"), JUDGE),
        must=("useless_reward",),
    ),
    Kind(
        name="saturated",
        what="a reward that nearly all answers get",
        overrides=(function("saturated"), LASTS),
        steps=80,
        must=("useless_reward",),
        may=("ties_rising", "over_optimised", "collapsed"),
    ),
    Kind(
        name="ties",
        what="0 or 1 as the reward",
        overrides=(function("binary"), LASTS),
        steps=100,
        must=("ties_rising",),
        may=("useless_reward", "over_optimised"),
    ),
    Kind(
        name="rule_hot",
        what="counted words of praise as the reward, rate x 10, beta 0.05",
        overrides=(function("praise"), LASTS, "actor_rollout.dpo_beta=0.05", *rate(6.2e-3, 1e-3)),
        must=("over_optimised", "reference_too_far"),
        may=ANY,
    ),
    Kind(
        name="rule_binary_hot",
        what="a rule of 0 or 1 as the reward, rate x 10",
        overrides=(RULE, LASTS, *rate(6.2e-3, 1e-3)),
        if_broken=FAR,
        may=ANY,
    ),
    Kind(
        name="rule_beta_tiny",
        what="counted words of praise as the reward, beta 0.005, rate x 5",
        overrides=(function("praise"), LASTS, "actor_rollout.dpo_beta=0.005", *rate(3.1e-3, 1e-3)),
        must=("over_optimised",),
        may=ANY,
    ),
    Kind(
        name="brevity",
        what="minus the length as the reward",
        overrides=(function("brevity"), LASTS),
        must=("collapsed", "length_exploitation"),
        may=ANY,
    ),
    Kind(
        name="eos_length",
        what="length as the reward, no penalty for a missing end",
        overrides=(function("length"), "actor_rollout.missing_eos_penalty=0"),
        must=("eos_lost", "length_exploitation"),
        may=(*FAR, "ties_rising", "useless_reward"),
    ),
    Kind(
        name="short_room",
        what="12 tokens of room, no penalty for a missing end",
        steps=40,
        overrides=("actor_rollout.max_new_tokens=12", "actor_rollout.missing_eos_penalty=0"),
        must=("eos_lost",),
        may=("over_optimised",),
    ),
    Kind(
        name="ahead_8",
        what="`rollout.lookahead=8`",
        overrides=("rollout.lookahead=8",),
        seeds=(1, 2),
        steps=100,
        if_broken=("staleness_hurts", *FAR),
        may=("staleness_hurts", *FAR),
    ),
    Kind(
        name="ahead_8_hot",
        what="`rollout.lookahead=8`, rate x 5",
        overrides=("rollout.lookahead=8", *rate(3.1e-3, 5e-4)),
        seeds=(1, 2, 3, 4),
        must=("staleness_hurts",),
        may=ANY,
    ),
    Kind(
        name="offline",
        what="offline DPO as shipped: 71 of 100 texts are valid at its end",
        recipe=OFFLINE,
        steps=80,
        may=("offline_collapse",),
    ),
    Kind(
        name="offline_hot",
        what="offline DPO, rate x 4",
        recipe=OFFLINE,
        steps=100,
        seeds=(1, 2, 3, 4),
        overrides=rate(2e-3, 5e-4),
        must=("offline_collapse",),
        may=("rate_too_high", "reference_too_far"),
    ),
    Kind(
        name="offline_repeated",
        what="offline DPO, 12 epochs of 256 pairs",
        recipe=OFFLINE,
        steps=96,
        overrides=("actor_rollout.data_path={rewards}/few_pairs.jsonl",),
        must=("data_repeated",),
        may=("offline_collapse", "reference_too_far"),
    ),
    Kind(
        name="few_prompts",
        what="16 evaluation prompts",
        overrides=("eval.num_prompts=16",),
        steps=40,
        must=("evaluation_too_small",),
    ),
    Kind(
        name="undecided",
        what="100 evaluation prompts, a hundredth of the rate",
        steps=30,
        overrides=("eval.num_prompts=100", *rate(6e-6, 1e-6)),
        must=("evaluation_too_small",),
        may=("reference_too_near",),
    ),
    Kind(
        name="stale_engine",
        what="the engine keeps the first weights",
        overrides=("sync.verify_first=0",),
        steps=40,
        stale=True,
        must=("stale_engine",),
        may=FAR,
    ),
    Kind(
        name="slow_reward",
        what="on Ray, a reward function that takes a second",
        on_ray=True,
        steps=12,
        overrides=(function("slow"), "training.eval_interval=0"),
        must=("pool_idle",),
    ),
    Kind(
        name="uneven_engines",
        what="on Ray, four prompts a step on three engines that sample one completion at a time",
        on_ray=True,
        steps=20,
        overrides=(
            *("training.global_batch_size=4", "actor_rollout.ppo_mini_batch_size=4", "training.eval_interval=0"),
            *("resource_pool.actor_rollout=[4]", "actor_rollout.num_gpus_for_infer=3"),
            *("actor_rollout.num_samples_per_step=1", "actor_rollout.n_samples_per_prompt=24"),
        ),
        must=("one_engine_bounds",),
        may=(*ANY, "pool_idle"),
    ),
)

KINDS = {kind.name: kind for kind in (*HEALTHY, *BROKEN)}
