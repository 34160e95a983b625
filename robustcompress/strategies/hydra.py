"""HYDRA: learn which channels the robust loss can spare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from robustcompress.errors import Problems
from robustcompress.session import Session
from robustcompress.strategies.base import (
    Direction,
    check_numbers,
    group_norms,
    prune_to,
    uniform_widths,
)
from robustcompress.strategies.scores import MakeAscent, ScoreBased
from robustcompress.structure.gates import top_k_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Hydra(ScoreBased):
    """HYDRA (Sehwag et al., NeurIPS 2020) on channel groups.

    From the paper and its released settings: robust pretraining; scores started in proportion to the weights; weights
    frozen while the robust objective trains the scores through a straight-through top-k; batch-norm affines and
    statistics keep moving during the search; the same share of every group is kept; robust fine-tuning.

    Ours: one score a channel group instead of one a weight, gates at the readers so that a closed gate is exactly a
    removed channel, physical removal, batch-norm statistics re-estimated where channels close, and Adam for the scores
    (a channel's gate sums thousands of weight terms, so the paper's learning rate for weights does not carry over).
    Reconstructed: the split of the epochs, from the paper's 100 / 20 / 100.

    Attributes:
        pretrain: Share of the epochs before the search; skipped for a pretrained model.
        search: Share of the epochs in the search; at 0 this is exactly `magnitude`.
        score_lr: Adam's peak learning rate for the scores, which start in [0, 2.45].
        finetune_lr: Factor on the recipe's learning rate while fine-tuning.
    """

    name: ClassVar[str] = "hydra"
    direction: ClassVar[Direction] = "prune"
    pretrain: float = 0.45
    search: float = 0.10
    score_lr: float = 0.02
    finetune_lr: float = 1.0

    def __post_init__(self) -> None:
        problems = Problems("hydra cannot run")
        ranges = {"pretrain": (0.0, 0.99), "search": (0.0, 0.99), "score_lr": (1e-9, 10.0), "finetune_lr": (1e-9, 10.0)}
        check_numbers(problems, self, ranges)
        if not problems.items and self.pretrain + self.search >= 1:
            problems.add(f"pretrain={self.pretrain!r} and search={self.search!r} leave no epochs to fine-tune")
        problems.raise_if_any()

    def run_with(
        self, session: Session, *, ascent: MakeAscent | None = None, finetune_awp: float | None = None
    ) -> None:
        """Pretrain, search, cut, fine-tune; see `ScoreBased.run_with`."""
        pretrain = 0.0 if session.goal.pretrained else self.pretrain
        if pretrain:
            session.train("pretrain", share=pretrain)
            session.settle()
        widths, scores = uniform_widths(session), group_norms(session.editor)
        if self.search:
            scores = self._learn(session, widths, scores, ascent)
        prune_to(session, widths, scores)
        session.recalibrate()
        share = 1 - pretrain - self.search
        session.train("finetune", share=share, lr_scale=self.finetune_lr, select=True, awp=finetune_awp)

    def _learn(
        self, session: Session, widths: dict[str, int], norms: dict[str, torch.Tensor], ascent: MakeAscent | None
    ) -> dict[str, torch.Tensor]:
        start = session.decide(
            "scores to begin with",
            lambda: {name: (6**0.5 * values / values.max()).float() for name, values in norms.items()},
        )
        affine = [p for m in session.model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        with session.editor.gates(start, lambda name, values: top_k_mask(values, widths[name])) as gates:
            session.recalibrate()
            groups: list[dict[str, Any]] = [{"params": gates.parameters()}, {"params": affine, "lr_scale": 0.02}]
            session.train_only(
                "search",
                [g for g in groups if g["params"]],
                share=self.search,
                lr=self.score_lr,
                ascent=ascent(gates) if ascent is not None else None,
            )
            learnt = {name: values.detach().cpu() for name, values in gates.scores.items()}
        swapped = sum(_changes(start[name], learnt[name], widths[name]) for name in start)
        total = sum(len(values) for values in start.values())
        session.record({"phase": "search", "event": "scores", "changed": swapped / total})
        session.say(f"search changed {swapped} of {total} channel decisions")
        return learnt


def _changes(before: torch.Tensor, after: torch.Tensor, k: int) -> int:
    """Channels that are kept under exactly one of two rankings."""
    return int((top_k_mask(before, k) != top_k_mask(after, k)).sum())
