"""Small networks whose worst case is known, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import robustcompress as rc

SIDE = 8


class Linear(nn.Module):
    """Two classes, told apart by a weighted sum of the pixels: under linf the worst image is x - eps * sign(w)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3 * SIDE * SIDE, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        score = (x - 0.5).flatten(1) @ self.weight
        return torch.stack([score, -score], 1)


class Lying(nn.Module):
    """Computes what another network computes, with gradients that lead the other way."""

    def __init__(self, honest: nn.Module) -> None:
        super().__init__()
        self.honest = honest

    def forward(self, x: Tensor) -> Tensor:
        logits = self.honest(x)
        return 2 * logits.detach() - logits  # the same values; the gradient's sign is turned around


def linear_data(n: int, eps: float, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Images in the middle of the range (no bound is felt), their labels, and which withstand linf eps for sure."""
    generator = torch.Generator().manual_seed(seed)
    model = Linear()
    pixels = (64 + 128 * torch.rand(n, 3, SIDE, SIDE, generator=generator)).to(torch.uint8)
    weight = model.weight.detach()
    flat = pixels.float().div(255).sub(0.5).flatten(1)
    # Bring half of the margins near to what the adversary can take away, so that some stand and some fall.
    reach = eps * float(weight.abs().sum())
    wanted = torch.linspace(-1.8, 1.8, n) * reach
    shift = (wanted - flat @ weight)[:, None] * weight.sign() / weight.abs().sum()
    pixels = (flat + shift + 0.5).clamp(0.2, 0.8).mul(255).round().to(torch.uint8).view_as(pixels)
    margins = pixels.float().div(255).sub(0.5).flatten(1) @ weight
    labels = (margins < 0).long()
    return pixels, labels, margins.abs() > reach


def linear_file(path: Path, kind: int = TensorProto.FLOAT, metadata: dict[str, str] | None = None) -> Path:
    """The linear network as a file that reads floats [n, 3, H, W], or bytes [n, H, W, 3]."""
    weight = Linear().weight.detach()
    both = torch.stack([weight, -weight], 1).numpy()
    bias = (-0.5 * torch.stack([weight, -weight], 1).sum(0)).numpy()
    shape: list[Any] = ["n", 3, SIDE, SIDE] if kind == TensorProto.FLOAT else ["n", SIDE, SIDE, 3]
    nodes = [helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT)]
    scale = 1.0 if kind == TensorProto.FLOAT else 1 / 255
    nodes.append(helper.make_node("Mul", ["float", "scale"], ["scaled"]))
    order = [0, 1, 2, 3] if kind == TensorProto.FLOAT else [0, 3, 1, 2]
    nodes.append(helper.make_node("Transpose", ["scaled"], ["first"], perm=order))
    nodes.append(helper.make_node("Flatten", ["first"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("weight", TensorProto.FLOAT, both.shape, both.flatten()),
            helper.make_tensor("bias", TensorProto.FLOAT, bias.shape, bias),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    proto.ir_version = 10
    helper.set_model_props(proto, {f"robustcompress.{key}": value for key, value in (metadata or {}).items()})
    onnx.save(proto, str(path))
    return path


def small() -> nn.Module:
    """A convolutional network with random weights."""
    torch.manual_seed(0)
    model, _ = rc.build_model("resnet8", num_classes=10, width=0.5)
    return model.eval()
