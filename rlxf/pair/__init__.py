"""From scored completions to preference pairs."""
