"""Every rule, with what people must know when it holds. ``docs/health.md`` has a section on each."""

from __future__ import annotations

from rlxf.health import answers, evidence, rewards, sampling, training
from rlxf.health.facts import ROLES
from rlxf.health.verdict import Rule

# The metrics that rules read, of steps and of evaluations.
STEPPED = (
    *(answers.KL, answers.ENTROPY, answers.LENGTH, answers.SCORES, answers.SPREAD, answers.MARGIN, answers.DISTINCT),
    *(answers.ENDED, answers.CORRELATION, answers.LONGER),
    *(rewards.TIES, rewards.AT_MAX, rewards.ACCURACY, rewards.AGREES),
    *(training.MARGINS, training.LOSS, training.NORM, training.BETA),
    *(f"{name}/{side}" for name in ("rewards", "logps") for side in ("chosen", "rejected")),
    *(sampling.DRIFT, sampling.LAG, sampling.ESS, sampling.IMBALANCE, sampling.TAIL, sampling.GEN),
    *(f"timing/idle_{role}" for role in ROLES),
    "epoch",
)
EVALUATED = (evidence.WINS, evidence.WINS_ERROR, evidence.REWARD, evidence.REWARD_ERROR)

_ALL = (
    Rule(
        name="over_optimised",
        title="Over-optimised",
        look=answers.over_optimised,
        why="The score rises because the policy has left the texts on which the reward can be trusted. The answers "
        "get worse while the number gets better.",
        advice="Read samples. Go back to an earlier checkpoint; raise actor_rollout.dpo_beta, lower "
        "actor_rollout.lr, or train fewer steps. Measure with a second reward or a judge that training does not use.",
    ),
    Rule(
        name="length_exploitation",
        title="Length exploitation",
        look=answers.length_exploitation,
        why="The reward pays for length, or for brevity, and the policy has learned to write more, or less, instead of "
        "better.",
        advice="Correct the reward, or set algorithm.max_length_ratio; where answers get longer, "
        "actor_rollout.length_penalty. Compare answers of equal length.",
    ),
    Rule(
        name="eos_lost",
        title="EOS lost",
        look=answers.eos_lost,
        why="Answers that are cut off are scored and trained on as if they were whole, and the policy forgets to stop.",
        advice="Set actor_rollout.missing_eos_penalty, or raise actor_rollout.max_new_tokens if good answers need "
        "more room.",
    ),
    Rule(
        name="collapsed",
        title="Collapsed",
        look=answers.collapsed,
        why="Completions that repeat each other give no pairs to learn from, and the policy has lost other ways to "
        "answer. More training does not bring them back.",
        advice="Go back to an earlier checkpoint; raise actor_rollout.dpo_beta or lower actor_rollout.lr. Check that "
        "rollout.temperature is near 1.",
    ),
    Rule(
        name="useless_reward",
        title="Useless reward",
        look=rewards.useless_reward,
        why="The scores do not say which of two answers is better, so training on them teaches nothing, or noise.",
        advice="Read samples with their scores. Check that the reward reads the text and the columns that it should, "
        "and that its scores spread over the answers of one prompt.",
    ),
    Rule(
        name="ties_rising",
        title="Ties rising",
        look=rewards.ties_rising,
        why="A prompt whose answers have equal scores gives no pair. Fewer and fewer prompts of a step teach "
        "something.",
        advice="Take a finer reward or add a second one, harder prompts, or more samples "
        "(actor_rollout.n_samples_per_prompt). If the scores are at their highest, the run is done.",
    ),
    Rule(
        name="reference_too_near",
        title="Reference too near",
        look=training.reference_too_near,
        why="The policy hardly moves: the steps are spent on nothing.",
        advice="Lower actor_rollout.dpo_beta or raise actor_rollout.lr. If both are usual, check the reward.",
    ),
    Rule(
        name="reference_too_far",
        title="Reference too far",
        look=training.reference_too_far,
        why="Nothing holds the policy near the reference any more: either it is so far away that language goes lost, "
        "or margins are so large that pairs give no gradient.",
        advice="Go back to an earlier checkpoint. Raise actor_rollout.dpo_beta where the KL is large; lower it, or "
        "train fewer epochs, where margins are.",
    ),
    Rule(
        name="rate_too_high",
        title="Learning rate too high",
        look=training.rate_too_high,
        why="Steps are larger than the pairs justify: the loss is above that of a policy without training, the "
        "policy prefers worse answers, or gradients grow.",
        advice="Lower actor_rollout.lr (a third is a good first try), add actor_rollout.lr_warmup_iters, and check "
        "actor_rollout.clip_grad.",
    ),
    Rule(
        name="stale_engine",
        title="Stale or wrong engine",
        look=sampling.stale_engine,
        why="The engine samples from other weights, or computes other numbers, than the trainer takes it to. The "
        "pairs then belong to another policy.",
        advice="Set sync.verify_interval=1 to find the step at which they part. Check the precision of both, and the "
        "version of the engine.",
    ),
    Rule(
        name="staleness_hurts",
        title="Staleness hurts",
        look=sampling.staleness_hurts,
        why="The policy has moved so far since its samples were drawn that they say little about it.",
        advice="Lower rollout.lookahead (1 is nearly always enough) or actor_rollout.lr.",
    ),
    Rule(
        name="offline_collapse",
        title="Offline collapse",
        look=training.offline_collapse,
        why="Probability flows from both sides of the pairs to texts that are in no pair. The accuracy rises while "
        "what the policy writes gets worse.",
        advice="Stop earlier, lower actor_rollout.lr, raise actor_rollout.dpo_beta or set actor_rollout.pref_ftx; or "
        "train online. Sample texts before you use the policy.",
    ),
    Rule(
        name="evaluation_too_small",
        title="Evaluation set too small",
        look=evidence.evaluation_too_small,
        why="A difference within two standard errors may be chance.",
        advice="Raise eval.num_prompts (four times as many halve the error), and compare several seeds.",
        of_evaluations=True,
    ),
    Rule(
        name="data_repeated",
        title="Data seen too often",
        look=evidence.data_repeated,
        why="The model learns the rows by heart. The training loss falls while held-out rows get no better.",
        advice="Compare eval/loss of earlier evaluations and take that checkpoint, or lower training.epochs.",
    ),
    Rule(
        name="one_engine_bounds",
        title="Sampling bound by one engine",
        look=sampling.one_engine_bounds,
        why="The other engines wait for the one with the longest completions.",
        advice="Set rollout.dispatch=queue or rollout.stream_prompts, sample more prompts in a step, or set "
        "rollout.lookahead=1.",
    ),
    Rule(
        name="pool_idle",
        title="Pool idle",
        look=sampling.pool_idle,
        why="Devices that are idle most of the time could do other work.",
        advice="Let roles share devices (resource_pool.colocate), give the pool fewer devices, or set "
        "rollout.lookahead=1.",
    ),
)
RULES = {rule.name: rule for rule in _ALL}
