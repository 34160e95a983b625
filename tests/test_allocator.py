"""Memory is kept while work lasts, where there is plenty; in the end glibc does what it did before."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from robustcompress import Images, Recipe, ThreatModel, allocator, evaluate
from robustcompress.allocator import Keeper, kept_memory
from robustcompress.data import Batches
from robustcompress.robust import PGDAT, Natural, Objective, memory
from robustcompress.train import make_optimizer, train

USUAL = [(-1, 64 << 20), (-3, 32 << 20), "trim"]
KEPT = [(-1, -1), (-3, 2**31 - 1)]


class Library:
    """Writes down what the allocator is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.told.append((parameter, value))
        return 1

    def malloc_trim(self, pad: int) -> int:
        assert pad == 0
        self.told.append("trim")
        return 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """A library that is told, a process of 1 GB, and a system with 8 GB left."""
    fake = Library()
    monkeypatch.setattr(allocator, "c_library", lambda: fake)
    monkeypatch.setattr(allocator, "KEEPER", Keeper())
    monkeypatch.setattr(allocator, "EVERY_S", 0.0)
    monkeypatch.setattr(allocator, "room", lambda: 4 << 30)
    monkeypatch.setattr(allocator, "_held", lambda: (1 << 30, 1 << 30))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    yield fake
    assert not allocator.KEEPER.keeps


def test_memory_is_kept_after_a_step_and_given_back_in_the_end(library: Library) -> None:
    with kept_memory("cpu") as look:
        assert library.told == []
        look()
        assert library.told == KEPT
        look()
        assert library.told == KEPT
    assert library.told == KEPT + USUAL


def test_it_is_given_back_after_an_error(library: Library) -> None:
    with pytest.raises(KeyError), kept_memory("cpu") as look:
        look()
        raise KeyError
    assert library.told == KEPT + USUAL


def test_whoever_ends_last_gives_it_back(library: Library) -> None:
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(kept_memory("cpu"))()
        second.enter_context(kept_memory("cpu"))()
        first.close()
        assert library.told == KEPT
    assert library.told == KEPT + USUAL


def test_work_without_a_step_tells_nobody_anything(library: Library) -> None:
    with kept_memory("cpu"):
        pass
    with kept_memory("cuda") as look:
        look()
    assert library.told == []


@pytest.mark.parametrize(
    ("most", "processes", "kept"), [(4 << 30, 1, True), (5 << 30, 1, False), (2 << 30, 2, True), (3 << 30, 2, False)]
)
def test_it_is_kept_where_there_is_plenty(
    library: Library, monkeypatch: pytest.MonkeyPatch, most: int, processes: int, kept: bool
) -> None:
    monkeypatch.setattr(allocator, "_held", lambda: (1 << 30, most))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with kept_memory("cpu") as look:
        look()
        assert allocator.KEEPER.keeps is kept


def test_where_little_is_left_it_is_given_back_for_good(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    with kept_memory("cpu") as look:
        look()
        monkeypatch.setattr(allocator, "_held", lambda: (8 << 30, 8 << 30))
        monkeypatch.setattr(allocator, "room", lambda: 1 << 30)
        look()
        assert library.told == KEPT  # a quarter of what is held is still free
        monkeypatch.setattr(allocator, "room", lambda: (1 << 30) - 1)
        look()
        assert library.told == KEPT + USUAL
        monkeypatch.setattr(allocator, "room", lambda: 1 << 40)
        look()
        assert library.told == KEPT + USUAL
    with kept_memory("cpu") as look:  # the next work asks anew
        look()
        assert allocator.KEEPER.keeps


def test_where_memory_ran_out_nothing_is_kept(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEEPER", allocator.KEEPER)
    with kept_memory("cpu") as look:
        look()
        memory.release()
        look()
        assert library.told == KEPT + USUAL
    memory.release()
    with kept_memory("cpu") as look:
        look()
        assert allocator.KEEPER.keeps


def test_the_system_is_not_asked_after_every_step(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(allocator, "EVERY_S", 3600.0)
    monkeypatch.setattr(allocator, "room", lambda: asked.append(1) or 4 << 30)
    with kept_memory("cpu") as look:
        for _ in range(5):
            look()
    assert len(asked) == 1


@pytest.mark.parametrize("name", allocator.SETTINGS)
def test_what_users_tell_glibc_stands(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert allocator.c_library() is None


def test_a_system_that_tells_nothing_keeps_nothing(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(allocator, "c_library", lambda: library)
    monkeypatch.setattr(allocator, "KEEPER", Keeper())
    monkeypatch.setattr(Path, "read_text", lambda self: "")
    with kept_memory("cpu") as look:
        look()
    assert library.told == []


def test_training_and_evaluation_keep_it(library: Library) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 3))
    images = Images(torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8), torch.arange(6) % 3)
    _train(model, images, 2, Natural(), epochs=1)
    assert library.told == KEPT + USUAL
    library.told.clear()
    evaluate(model, images, attacks=("clean",), device="cpu")
    assert library.told == []  # nothing has shown yet what an attack takes
    evaluate(model, images, attacks=("clean", "fgsm"), device="cpu")
    assert library.told == KEPT + USUAL


def test_kept_memory_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, plain = _trained(), _trained(monkeypatch)
    assert all(torch.equal(kept[name], plain[name]) for name in plain)


def _trained(monkeypatch: pytest.MonkeyPatch | None = None) -> dict[str, torch.Tensor]:
    """Weights after three steps whose layers are blocks of 50 MB; nothing is kept where a patch is given."""
    if monkeypatch is not None:
        monkeypatch.setattr(allocator, "c_library", lambda: None)
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(16, 4))
    pixels = torch.randint(256, (4 * 192, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    told: list[bool] = []
    _train(
        model,
        Images(pixels, torch.arange(len(pixels)) % 4),
        192,
        PGDAT(steps=1),
        epochs=0.75,
        on_step=lambda _: told.append(allocator.KEEPER.keeps),
    )
    assert not any(told) or monkeypatch is None
    return model.state_dict()


def _train(
    model: nn.Module,
    images: Images,
    batch_size: int,
    objective: Objective,
    *,
    epochs: float,
    on_step: Callable[[int], None] | None = None,
) -> None:
    recipe = Recipe(batch_size=batch_size)
    train(
        model,
        Batches(images, batch_size, generator=torch.Generator().manual_seed(0)),
        objective,
        ThreatModel(),
        recipe,
        epochs=epochs,
        optimizer=make_optimizer(recipe, list(model.parameters()), lr=0.1),
        lr=0.1,
        schedule="constant",
        generator=torch.Generator().manual_seed(0),
        on_step=on_step,
    )


FAULTS = """
import resource, sys, torch
from robustcompress.allocator import KEEPER, kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(16 << 20).fill_(1.0)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
with kept_memory("cpu") as look:
    look()
    faults()
    print(KEEPER.keeps, usual, faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_kept_memory_is_had_again_without_the_system() -> None:
    surroundings = {name: value for name, value in os.environ.items() if name not in allocator.SETTINGS}
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=surroundings)
    keeps, usual, *kept = done.stdout.split()
    if keeps == "False":
        pytest.skip("too little memory is free")
    assert all(20 * int(count) < int(usual) for count in kept)
