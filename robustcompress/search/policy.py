"""The policy of RC-NAS: from stages and a task to what each stage is to keep.

After Wang et al. 2024, "Reinforced Compressive Neural Architecture Search for Versatile Adversarial Robustness"
(arXiv 2406.06792): its figures show the tokens of the stages, the bidirectional LSTM over them, the features that are
joined to its states, and one head per action. Sizes, scales, the split into heads for depth, width and the type of
blocks, and the interpolation between shares are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from robustcompress.checkpoint.disk import save_tensors
from robustcompress.errors import Problems, ResultError, first_line, nearest
from robustcompress.search.domain import BLOCKS, Coordinate, Domain, Task

ATTACKS = ("clean", "fgsm", "pgd", "cw", "autoattack")
"""What robustness may be measured by, weakest first."""

SHARES = 9
"""Logits of a head: they stand at the shares 0, 1/8, ..., 1."""

VERSION = 2
"""The newest that is read. A policy whose head for types was never trained is written as 1, without that head."""
_FORMAT = "robustcompress-policy"
_TOKEN = 4
_TASK = 4 + len(ATTACKS) + 2
_LARGEST = 1024


class Policy(nn.Module):
    """Probabilities of all options of a domain, whatever its number of stages and of options.

    Each stage's token and the task make its encoding; a bidirectional LSTM reads the encodings. Of every stage its
    forward and backward state, the Lipschitz constant, the cost over the budget, the task and the stage's place go
    through one small network that all stages share, to `SHARES` logits for depth, as many for width, and one for each
    type of block. An option takes the logit interpolated at its share, or that of its type. A new policy is uniform.

    Args:
        hidden: Width of all layers.
        seed: Of the first weights; torch's global generators are left alone.
    """

    def __init__(self, *, hidden: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.hidden = hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encode = nn.Linear(_TOKEN + _TASK, hidden)
            self.lstm = nn.LSTM(hidden, hidden, bidirectional=True)
            self.mix = nn.Linear(2 * hidden + _TASK + 3, hidden)
            self.depth = nn.Linear(hidden, SHARES)
            self.width = nn.Linear(hidden, SHARES)
            self.block = nn.Linear(hidden, len(BLOCKS))
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    @property
    def heads(self) -> tuple[nn.Linear, ...]:
        """The last layers."""
        return self.depth, self.width, self.block

    def forward(self, domain: Domain) -> list[Tensor]:
        """Log-probabilities of the options of each coordinate.

        Raises:
            InputError: The task or a token holds what cannot be (see `task_vector`).
        """
        task = task_vector(domain.task)
        tokens = torch.tensor([_scaled(t.stride, t.depth, t.width, t.robust_block) for t in domain.tokens])
        count = len(tokens)
        encoded = torch.tanh(self.encode(torch.cat([tokens, task.expand(count, -1)], 1)))
        states, _ = self.lstm(encoded)
        net = torch.tensor([math.log1p(domain.task.lipschitz), -math.log(domain.task.budget)])
        place = torch.linspace(0, 1, count)[:, None] if count > 1 else torch.ones(1, 1)
        features = torch.cat([net[:1].expand(count, 1), states, net[1:].expand(count, 1)], 1)
        mixed = torch.tanh(self.mix(torch.cat([features, task.expand(count, -1), place], 1)))
        heads = {"depth": self.depth(mixed), "width": self.width(mixed), "block": self.block(mixed)}
        return [
            _logits(heads[coordinate.kind][coordinate.stage], coordinate).log_softmax(0)
            for coordinate in domain.coordinates
        ]

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these weights over; where the head for types of blocks is not among them, it is neutral.

        Raises:
            RuntimeError: They are those of another policy.
        """
        neutral = {f"block.{name}": torch.zeros_like(p) for name, p in self.block.named_parameters()}
        self.load_state_dict({**neutral, **tensors})

    def save(self, path: str | Path) -> Path:
        """Write weights and sizes to one safetensors file, whole or not at all."""
        path = Path(path)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        neutral = not any(bool(parameter.any()) for parameter in self.block.parameters())
        if neutral:  # then versions before types of blocks read it, too
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("block.")}
        version = 1 if neutral else VERSION
        metadata = {"format": _FORMAT, "version": str(version), "hidden": str(self.hidden), "shares": str(SHARES)}
        save_tensors(path, tensors, metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy back.

        Raises:
            ResultError: The file is missing, damaged, of a newer version, or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise ResultError(f"there is no policy {path}; name a file that Policy.save wrote")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise ResultError(f"the policy {path} is damaged ({first_line(error)}); train or copy it anew") from error
        hidden = _hidden(path, metadata)
        policy = cls(hidden=hidden)
        try:
            policy.take(tensors)
        except RuntimeError as error:
            raise ResultError(f"the policy {path} has other tensors than its sizes say; copy it anew") from error
        broken = sorted(name for name, tensor in tensors.items() if not bool(tensor.isfinite().all()))
        if broken:
            raise ResultError(f"the policy {path} holds values that are not finite in {', '.join(broken)}")
        return policy


def task_vector(task: Task) -> Tensor:
    """A task as `[11]` numbers of about unit size: budget, multiply-adds, attack, radius, classes, accuracies.

    Raises:
        InputError: A value cannot be; all such values are named.
    """
    problems = Problems("a policy cannot read this task")
    if not 0 < task.budget <= 1:
        problems.add(f"budget={task.budget}: must be in (0, 1]")
    for name, least in (("macs", 1.0), ("classes", 1.0), ("eps", 0.0), ("lipschitz", 0.0)):
        value = getattr(task, name)
        if not (math.isfinite(value) and value >= least):
            problems.add(f"{name}={value}: must be at least {least:g}")
    for name in ("clean", "robust"):
        if not 0 <= getattr(task, name) <= 1:
            problems.add(f"{name}={getattr(task, name)}: must be an accuracy in [0, 1]")
    if task.attack not in ATTACKS:
        problems.add(f"attack={task.attack!r} is unknown{nearest(task.attack, ATTACKS)}")
    problems.raise_if_any()
    return torch.tensor(
        [
            math.log(task.budget),
            (math.log(task.macs) - 19) / 4,
            *(float(task.attack == name) for name in ATTACKS),
            task.eps * 255 / 8,
            math.log(task.classes) / math.log(100),
            task.clean,
            task.robust,
        ]
    )


def _scaled(stride: float, depth: float, width: float, robust_block: float) -> tuple[float, ...]:
    return math.log2(stride), math.log(depth + 1) - 1, math.log(width + 1) - 4, robust_block


def _logits(logits: Tensor, coordinate: Coordinate) -> Tensor:
    """Of a head's logits, those of a coordinate's options: `[len(options)]`."""
    if coordinate.kind == "block":
        return logits[[int(option) for option in coordinate.options]]
    return _interpolated(logits, coordinate.options)


def _interpolated(logits: Tensor, shares: tuple[float, ...]) -> Tensor:
    """Of `[SHARES]` logits, those at the given shares, linear between two: `[len(shares)]`."""
    places = torch.tensor(shares, dtype=torch.float64).clamp(0, 1) * (SHARES - 1)
    low = places.floor().clamp(max=SHARES - 2).long()
    weight = (places - low).to(logits.dtype)
    return logits[low] * (1 - weight) + logits[low + 1] * weight


def _hidden(path: Path, metadata: dict[str, str]) -> int:
    if metadata.get("format") != _FORMAT:
        raise ResultError(f"{path} holds no policy; name a file that Policy.save wrote")
    try:
        version, hidden, shares = (int(metadata[name]) for name in ("version", "hidden", "shares"))
    except (KeyError, ValueError) as error:
        raise ResultError(f"the policy {path} does not say its sizes; copy it anew") from error
    if version > VERSION:
        raise ResultError(f"the policy {path} has version {version}; this version reads up to {VERSION}: upgrade")
    if shares != SHARES or not 1 <= hidden <= _LARGEST:
        raise ResultError(f"the policy {path} says {hidden} hidden units and {shares} shares, which no policy has")
    return hidden
