"""Models, tokenizers and model folders: what the rooms share."""
