"""The tiny world: a grammar with a known ground truth, and the models of the quick start that live in it."""
