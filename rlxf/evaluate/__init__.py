"""Measuring the policy while it is trained, or instead of training it."""

from rlxf.evaluate.due import no_evaluation
from rlxf.evaluate.offline import OfflineEvaluation
from rlxf.evaluate.online import EvalBackends, Evaluation, EvaluationSettings
from rlxf.evaluate.only import evaluate_only
from rlxf.evaluate.user import load_metrics

__all__ = [
    "EvalBackends",
    "Evaluation",
    "EvaluationSettings",
    "OfflineEvaluation",
    "evaluate_only",
    "load_metrics",
    "no_evaluation",
]
