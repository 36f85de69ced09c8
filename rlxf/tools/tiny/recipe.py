"""How the tiny world is made. The defaults are the recipe that the quick start's figures belong to."""

from __future__ import annotations

from dataclasses import dataclass

VERSION = 5  # raise it with every change that changes a file: cached worlds of another version are made anew


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Sizes and seeds of everything in the folder. How its models are trained is in ``configs/rlxf``."""

    version: int = VERSION
    seed: int = 0
    num_texts: int = 20_000  # corpus of the first policy
    num_tokenizer_texts: int = 4_000  # of these, for the tokenizer; it stops at 586 tokens: no merges are left
    hidden_size: int = 96
    ffn_size: int = 256
    num_layers: int = 2
    num_heads: int = 3  # head size 32, the smallest that vLLM's CPU attention has
    max_positions: int = 256
    policy_overrides: tuple[str, ...] = ()  # of sft_trainer_tiny
    reward_overrides: tuple[str, ...] = ()  # of reward_trainer_tiny
    num_reward_pairs: int = 5_500  # of the grammar, labelled with the ground truth
    num_held_out_pairs: int = 500
    label_noise: float = 0.0  # share of reward pairs with the sides swapped
    num_eval_prompts: int = 256
    num_preferences: int = 3_200  # pairs of first-policy samples, labelled by the reward model, for offline training
    max_new_tokens: int = 32
