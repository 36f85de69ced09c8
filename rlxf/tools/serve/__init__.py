"""A reward model or a reward function as an HTTP service."""
