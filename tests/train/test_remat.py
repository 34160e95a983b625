"""Blocks that are computed again: the same numbers, less memory, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress.robust import PGDAT, ThreatModel, pgd
from robustcompress.robust.attacks import eval_mode
from robustcompress.train.remat import blocks_of, rematerialised

THREAT = ThreatModel("linf", 0.05)


class Dropping(nn.Module):
    """A residual network with everything that a second pass could get wrong: statistics, dropout, instance norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(self.block(i) for i in range(3)))
        self.head = nn.Linear(8, 5)

    @staticmethod
    def block(number: int) -> nn.Module:
        norm = nn.InstanceNorm2d(8, track_running_stats=True) if number == 1 else nn.BatchNorm2d(8, momentum=None)
        return Residual(nn.Conv2d(8, 8, 3, padding=1), norm, nn.ReLU(), nn.Dropout(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "own": Dropping(),
        "resnet8": rc.build_model("resnet8", width=0.25, num_classes=5)[0],
        "densenet121": rc.build_model("densenet121", width=0.25, num_classes=5)[0],
        "vit_micro": rc.build_model("vit_micro", num_classes=5)[0],
    }


@pytest.mark.parametrize("name", ["own", "resnet8", "densenet121", "vit_micro"])
def test_a_step_is_the_same_to_the_last_bit(name: str) -> None:
    plain = networks()[name]
    ours = copy.deepcopy(plain)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])
    forward = {type(module).forward for module in ours.modules()}
    for model in (plain, ours):
        model.train()
        torch.manual_seed(7)
        for _ in range(2):
            if model is ours:
                with rematerialised(model) as count:
                    assert count >= 3
                    step = PGDAT(steps=2).loss(model, x, y, THREAT, generator=torch.Generator().manual_seed(1))
                    step.loss.backward()
            else:
                step = PGDAT(steps=2).loss(model, x, y, THREAT, generator=torch.Generator().manual_seed(1))
                step.loss.backward()
    for (key, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), key
    for (key, mine), theirs in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs), key
    assert all("forward" not in module.__dict__ for module in ours.modules())
    assert {type(module).forward for module in ours.modules()} == forward
    assert all(module.training for module in ours.modules())


def saved_bytes(model: nn.Module, checkpointed: bool) -> int:
    """What the graph of one pass keeps beside the weights."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.rand(8, 3, 32, 32)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if checkpointed:
            with rematerialised(model):
                model(x).sum()
        else:
            model(x).sum()
    return sum(kept.values())


def test_less_is_kept_for_the_way_back() -> None:
    model = rc.build_model("resnet20", num_classes=5)[0]
    assert saved_bytes(model, True) < 0.35 * saved_bytes(model, False)


def test_attacks_in_eval_mode_are_the_same_and_keep_the_statistics() -> None:
    model = networks()["own"]
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    before = copy.deepcopy(model.state_dict())
    with eval_mode(model):
        plain = pgd(model, x, y, THREAT, steps=3, random_start=False)
        with rematerialised(model):
            ours = pgd(model, x, y, THREAT, steps=3, random_start=False)
    assert torch.equal(ours, plain)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_hooks_inside_and_edits_in_between() -> None:
    model = networks()["resnet8"]
    editor = rc.StructuralEditor(model, torch.rand(2, 3, 32, 32))
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    gate = torch.ones((), requires_grad=True)
    hook = model.get_submodule(blocks_of(model)[0][0]).register_forward_hook(lambda _, __, output: output * gate)
    name = next(name for name, group in editor.groups.items() if group.width > 4)
    for _ in range(2):
        with rematerialised(model):
            model.train()
            PGDAT(steps=1).loss(model, x, y, THREAT, generator=torch.Generator().manual_seed(1)).loss.backward()
        assert gate.grad is not None and float(gate.grad.abs()) > 0
        editor.prune(name, list(range(editor.groups[name].width - 2)))
    hook.remove()


def test_an_error_leaves_nothing_behind() -> None:
    model = networks()["own"]
    with pytest.raises(ValueError, match="stop"), rematerialised(model):
        raise ValueError("stop")
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_which_blocks_are_found() -> None:
    assert [name for name, _ in blocks_of(networks()["own"])] == ["blocks.0", "blocks.1", "blocks.2"]
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    assert blocks_of(flat) == []
    inner = [name for name, _ in blocks_of(rc.build_model("densenet121", width=0.25)[0])]
    assert not any(a != b and b.startswith(f"{a}.") for a in inner for b in inner)
