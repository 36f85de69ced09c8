"""One page of a run, or of several beside each other: reads the files of run folders, and writes `report.html`.

Imports neither torch nor transformers, so that it starts at once and can run beside a run.
"""
