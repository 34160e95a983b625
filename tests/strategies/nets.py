"""Small reference networks of several joins, quick data, and a session without `compress()` around it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from robustcompress import Budget, DataSplits, Recipe, StructuralEditor, ThreatModel, load_data, measure
from robustcompress.distributed import Parts
from robustcompress.models.vit import Block
from robustcompress.robust.objectives import PGDAT, Objective
from robustcompress.session import Goal, Session

SIZE = 16
EXAMPLE = torch.zeros(2, 3, SIZE, SIZE)
QUICK_RECIPE = Recipe(batch_size=32, val_images=20)
QUICK_OBJECTIVE = PGDAT(steps=1)
HALF = Budget(macs=0.5)
LINF = ThreatModel()


class Chain(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv1, self.bn1 = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv3, self.bn3 = nn.Conv2d(12, 20, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(20)
        self.conv4, self.bn4 = nn.Conv2d(20, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.short, self.bn5 = nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = F.relu(self.bn5(self.short(x)) + self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x))))))
        return self.fc(x.mean((2, 3)))


class Joined(nn.Module):
    """Concatenation in front of a depthwise-separable convolution."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 10, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(10)
        self.side, self.bn1 = nn.Conv2d(10, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.bn2 = nn.Conv2d(18, 18, 3, stride=2, padding=1, groups=18), nn.BatchNorm2d(18)
        self.point, self.bn3 = nn.Conv2d(18, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = torch.cat([x, F.relu(self.bn1(self.side(x)))], 1)
        x = F.relu(self.bn3(self.point(F.relu(self.bn2(self.depth(x))))))
        return self.fc(x.mean((2, 3)))


class Imported(nn.Module):
    """As torchvision's classic networks come: no normalisation, a flatten, dropout, 1000 outputs."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(48, 24), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(24, num_classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


class Transformer(nn.Module):
    """Two blocks of attention over 4x4 patches."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(3, 16, 4, stride=4), nn.Parameter(torch.randn(1, 16, 4, 4) * 0.02)
        self.blocks = nn.Sequential(Block(16, 4, 6, 32), Block(16, 4, 6, 32))
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (self.patch(x) + self.position).flatten(2).transpose(1, 2)
        return self.fc(self.norm(self.blocks(x)).mean(1))


class Auxiliary(nn.Module):
    """Two classifiers on the way that only training asks for what they think, as GoogLeNet has."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.heads: nn.ModuleList | None = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 8, 1),
                nn.BatchNorm2d(8),
                nn.Conv2d(8, 8, 4, stride=4),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(8, num_classes),
            )
            for width in (12, 16)
        )
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> Any:
        one = F.relu(self.bn1(self.conv1(x)))
        two = F.relu(self.bn2(self.conv2(one)))
        logits = self.fc(F.relu(self.bn3(self.conv3(two))).mean((2, 3)))
        if self.training and self.heads is not None:
            return logits, self.heads[1](two), self.heads[0](one)
        return logits


NETS: dict[str, type[nn.Module]] = {
    "chain": Chain,
    "residual": Residual,
    "joined": Joined,
    "imported": Imported,
    "transformer": Transformer,
    "auxiliary": Auxiliary,
}


def build(name: str = "residual", *, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A network by name, with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETS[name](**kwargs)


@functools.cache
def small_data() -> DataSplits:
    """Real digits: 115 to train on, 13 to validate, 40 to test."""
    return load_data("digits", image_size=SIZE, train_limit=128, test_limit=40)


def make_session(
    model: nn.Module,
    *,
    data: DataSplits | None = None,
    budget: Budget = HALF,
    objective: Objective = QUICK_OBJECTIVE,
    epochs: float = 1.0,
    recipe: Recipe = QUICK_RECIPE,
    seed: int = 0,
    pretrained: bool = False,
    round_to: int = 1,
    threat: ThreatModel = LINF,
    parts: Parts | None = None,
) -> Session:
    """What `compress()` hands to a strategy, around the model itself (no copy)."""
    data = data or small_data()
    example = torch.zeros(2, *data.image_shape)
    goal = Goal(
        data=data,
        threat=threat,
        objective=objective,
        budget=budget,
        reference=measure(model, example),
        epochs=epochs,
        recipe=recipe,
        seed=seed,
        pretrained=pretrained,
        round_to=round_to,
    )
    return Session(model, StructuralEditor(model, example, seed=seed), example, goal, parts=parts)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
