"""A recipe as one frozen, fully checked object. Imports neither torch nor Ray, so a bad recipe fails in seconds."""
