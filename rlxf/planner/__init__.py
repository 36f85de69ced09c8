"""What a recipe costs before it starts: memory and seconds by formulas, from figures of a device. No torch, no Ray.

``jobs`` takes a recipe apart; ``memory`` and ``time`` know only jobs and a device; ``search`` varies the jobs.
"""
