"""Verdicts: what the curves of a run say about it. Pure functions of its metrics, without torch, Ray or files."""

from rlxf.health.facts import RunFacts, facts_of
from rlxf.health.health import Health
from rlxf.health.rules import RULES
from rlxf.health.verdict import Rule, Verdict

__all__ = ["RULES", "Health", "Rule", "RunFacts", "Verdict", "facts_of"]
