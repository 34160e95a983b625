"""What the network must withstand: threats, attacks, objectives, evaluation. Knows nothing of structure."""

from __future__ import annotations

from robustcompress.robust.attacks import AttackSpec, attack_by_name, eval_mode, fgsm, pgd
from robustcompress.robust.autoattack import AutoAttackConfig
from robustcompress.robust.evaluate import evaluate
from robustcompress.robust.hierarchy import Hierarchy, Severity, hierarchy_from
from robustcompress.robust.judge import EvaluationProgress
from robustcompress.robust.objectives import (
    FGSMRS,
    PGDAT,
    TRADES,
    JacobianNorm,
    LatentBoundary,
    Natural,
    Objective,
    ObjectiveStep,
    Regularised,
    Regulariser,
    SemanticAT,
    Separability,
    objective_from_json,
    objective_from_name,
)
from robustcompress.robust.report import AttackResult, RobustReport
from robustcompress.robust.statistics import PairedTest, compare, paired_test, wilson
from robustcompress.robust.threat import ThreatModel

__all__ = [
    "FGSMRS",
    "PGDAT",
    "TRADES",
    "AttackResult",
    "AttackSpec",
    "AutoAttackConfig",
    "EvaluationProgress",
    "Hierarchy",
    "JacobianNorm",
    "LatentBoundary",
    "Natural",
    "Objective",
    "ObjectiveStep",
    "PairedTest",
    "Regularised",
    "Regulariser",
    "RobustReport",
    "SemanticAT",
    "Separability",
    "Severity",
    "ThreatModel",
    "attack_by_name",
    "compare",
    "eval_mode",
    "evaluate",
    "fgsm",
    "hierarchy_from",
    "objective_from_json",
    "objective_from_name",
    "paired_test",
    "pgd",
    "wilson",
]
