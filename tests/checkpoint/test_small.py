"""The small form: how far off, and how large."""

from __future__ import annotations

from pathlib import Path

import torch

from robustcompress.checkpoint import files, read, write
from robustcompress.checkpoint.small import decode, encode
from robustcompress.models import build_model


def run_of(
    shapes: dict[str, torch.Size], *, selected: bool = False, adam: bool = False, drawn: bool = True
) -> dict[str, torch.Tensor]:
    """What a run of such a network would save, with rows of very different sizes."""
    generator = torch.Generator().manual_seed(0)

    def noise(shape: torch.Size) -> torch.Tensor:
        values = torch.randn(shape, generator=generator) if drawn else torch.ones(shape)
        return values * torch.logspace(-3, 0, shape[0]).view(-1, *[1] * (len(shape) - 1)) if len(shape) > 1 else values

    tensors = {f"model/{name}": 0.05 * noise(shape) for name, shape in shapes.items()}
    for number, (name, shape) in enumerate(shapes.items()):
        tensors[f"average/module.{name}"] = tensors[f"model/{name}"] + 0.01 * noise(shape)
        if selected:
            tensors[f"best/{name}"] = tensors[f"average/module.{name}"] + 0.01 * noise(shape)
        if adam:
            tensors[f"optimizer/0.{number}.state.exp_avg"] = 0.001 * noise(shape)
            tensors[f"optimizer/0.{number}.state.exp_avg_sq"] = 1e-6 * noise(shape).square()
            tensors[f"optimizer/0.{number}.state.step"] = torch.tensor(100.0)
        else:
            tensors[f"optimizer/0.{number}.state.momentum_buffer"] = 0.1 * noise(shape)
    return tensors | {"generator/torch": torch.get_rng_state()}


SHAPES = {"conv.weight": torch.Size([16, 8, 3, 3]), "bn.weight": torch.Size([16]), "fc.weight": torch.Size([10, 16])}


def row_error(there: torch.Tensor, here: torch.Tensor, of: torch.Tensor) -> float:
    """Largest error in a row over the row's largest value of `of`, over all rows."""
    return float(((there - here).abs().flatten(1).amax(1) / of.abs().flatten(1).amax(1)).max())


def test_rounding_errors_are_as_small_as_promised() -> None:
    given = run_of(SHAPES, selected=True, adam=True)
    back = decode(*encode(given))
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        if tensor.dim() < 2:
            assert torch.equal(back[name], tensor), "vectors and generators are exact"
    for layer in ("conv.weight", "fc.weight"):
        model, average, best = (given[f"{part}{layer}"] for part in ("model/", "average/module.", "best/"))
        assert row_error(back[f"model/{layer}"], model, model) < 2**-10
        assert row_error(back[f"average/module.{layer}"], average, average - model) < 1 / 200
        assert row_error(back[f"best/{layer}"], best, best - average) < 1 / 200
    for place in ("0.0", "0.2"):
        first, second = (f"optimizer/{place}.state.{name}" for name in ("exp_avg", "exp_avg_sq"))
        assert row_error(back[first], given[first], given[first]) < 1 / 250
        assert bool((back[second] >= given[second] * (1 - 1e-5)).all()), "never below: Adam must not take larger steps"
        assert row_error(back[second].sqrt(), given[second].sqrt(), given[second].sqrt()) < 1 / 120
        assert bool((back[second] > 0).all())


def test_momentum_gives_way_to_a_selected_epoch() -> None:
    assert any("momentum" in name for name in decode(*encode(run_of(SHAPES))))
    assert not any("momentum" in name for name in decode(*encode(run_of(SHAPES, selected=True))))


def test_values_beyond_float16_and_edited_shapes_are_kept() -> None:
    wild = torch.tensor([[1e6, 2.0], [float("inf"), 0.0]])
    given = {"model/a": wild, "average/module.a": torch.ones(3, 2), "model/zero": torch.zeros(2, 2)}
    back = decode(*encode(given))
    assert torch.equal(back["model/a"], wild) and torch.equal(back["average/module.a"], torch.ones(3, 2))
    assert torch.equal(back["model/zero"], given["model/zero"])


def test_a_small_checkpoint_keeps_layouts(tmp_path: Path) -> None:
    weight = torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last)
    write(tmp_path / "c", {}, {"model/w": weight, "average/module.w": weight + 0.1}, half=True)
    found = read(tmp_path / "c")
    assert found is not None and found.small
    for name in ("model/w", "average/module.w"):
        assert found.tensors[name].stride() == weight.stride()
    assert torch.allclose(found.tensors["average/module.w"], weight + 0.1, atol=2e-3)


def test_resnet18_takes_less_than_48_mb_in_files_of_15_mib(tmp_path: Path) -> None:
    shapes = {name: p.shape for name, p in build_model("resnet18")[0].named_parameters()}
    for selected in (False, True):
        write(tmp_path / "c", {}, run_of(shapes, selected=selected, drawn=False), half=True)
        sizes = [path.stat().st_size for path in (tmp_path / "c").iterdir()]
        assert 40e6 < sum(sizes) < 48e6
        assert max(sizes) <= files.SMALL_FILE == 15 * 2**20


def test_a_tensor_larger_than_a_file_is_cut_in_pieces(tmp_path: Path) -> None:
    huge = torch.arange(4_200_000, dtype=torch.int32).view(2, -1)
    write(tmp_path, {}, {"model/count": huge}, half=True)
    assert max(path.stat().st_size for path in tmp_path.iterdir()) <= files.SMALL_FILE
    found = read(tmp_path)
    assert found is not None and torch.equal(found.tensors["model/count"], huge)
