"""A world small enough for a laptop, with a known truth: reviews from a grammar, and the models that learn from them."""
