"""Which of two models answers better: completions, scores, and win rates with confidence intervals."""
