"""What the network must withstand: threats, attacks, objectives, evaluation. Knows nothing of structure."""

from __future__ import annotations

from robustcompress.robust.apgd import apgd_fast
from robustcompress.robust.attacks import AttackSpec, attack_by_name, eval_mode, fgsm, pgd
from robustcompress.robust.autoattack import AutoAttackConfig
from robustcompress.robust.evaluate import evaluate
from robustcompress.robust.hierarchy import Hierarchy, Severity, hierarchy_from
from robustcompress.robust.judge import EvaluationProgress
from robustcompress.robust.objectives import (
    ARD,
    FGSMRS,
    IAD,
    IBP,
    LTD,
    MART,
    PGDAT,
    RSLAD,
    TRADES,
    AdaAD,
    CrownIBP,
    FreeAT,
    JacobianNorm,
    LatentBoundary,
    Natural,
    Objective,
    ObjectiveStep,
    Regularised,
    Regulariser,
    RobustDistillation,
    SemanticAT,
    Separability,
    Smoothing,
    objective_from_json,
    objective_from_name,
)
from robustcompress.robust.report import AttackResult, RobustReport
from robustcompress.robust.statistics import PairedTest, compare, paired_test, wilson
from robustcompress.robust.threat import ThreatModel

__all__ = [
    "ARD",
    "FGSMRS",
    "IAD",
    "IBP",
    "LTD",
    "MART",
    "PGDAT",
    "RSLAD",
    "TRADES",
    "AdaAD",
    "AttackResult",
    "AttackSpec",
    "AutoAttackConfig",
    "CrownIBP",
    "EvaluationProgress",
    "FreeAT",
    "Hierarchy",
    "JacobianNorm",
    "LatentBoundary",
    "Natural",
    "Objective",
    "ObjectiveStep",
    "PairedTest",
    "Regularised",
    "Regulariser",
    "RobustDistillation",
    "RobustReport",
    "SemanticAT",
    "Separability",
    "Severity",
    "Smoothing",
    "ThreatModel",
    "apgd_fast",
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
