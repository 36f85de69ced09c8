"""Prompts and preference pairs from files: reading, checking, tokenizing, and the order in which a run sees them."""
