"""Which of two models answers better: completions, scores, and what they say about more prompts than these."""
