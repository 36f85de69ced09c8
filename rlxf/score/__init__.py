"""Giving a completion a score: reward model, Python function, recorded score; and the missing-EOS penalty."""
