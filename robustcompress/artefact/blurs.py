"""What corruptions are made of: filters, warps, clouds, and the two that Pillow does."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def scale_of(x: Tensor) -> float:
    """How much longer a length is here than in an image of 32 pixels."""
    return min(x.shape[2:]) / 32


def gaussian_kernel(sigma: float, *, truncate: float = 4.0) -> Tensor:
    """Weights of a Gaussian that sum to 1, cut off at `truncate` sigmas: [2 r + 1]."""
    radius = int(truncate * sigma + 0.5)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / max(sigma, 1e-6)).square())
    return weights / weights.sum()


def separable(x: Tensor, kernel: Tensor) -> Tensor:
    """Filter [N, C, H, W] along both axes; beyond the edge the image goes on as in a mirror."""
    channels = x.shape[1]
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        weights = kernel.view(shape).expand(channels, -1, -1, -1)
        down, across = weights.shape[2] // 2, weights.shape[3] // 2
        x = F.conv2d(_mirrored(x, across, down), weights, groups=channels)
    return x


def blurred(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur."""
    return separable(x, gaussian_kernel(sigma))


def filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Filter [N, C, H, W] with one kernel [k, k], or with one for each image, [N, k, k]."""
    n, channels = x.shape[:2]
    reach = kernel.shape[-1] // 2
    kernels = kernel.expand(n, *kernel.shape[-2:]).repeat_interleave(channels, 0)[:, None]
    padded = _mirrored(x, reach, reach).reshape(1, n * channels, x.shape[2] + 2 * reach, x.shape[3] + 2 * reach)
    return F.conv2d(padded, kernels, groups=n * channels).view_as(x)


def _mirrored(x: Tensor, across: int, down: int) -> Tensor:
    rows = _reflect(torch.arange(-down, x.shape[2] + down), x.shape[2])
    columns = _reflect(torch.arange(-across, x.shape[3] + across), x.shape[3])
    return x[:, :, rows][..., columns]


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices that bounce off both ends however far they reach."""
    if size == 1:
        return torch.zeros_like(index)
    index = index.remainder(2 * size - 2)
    return torch.where(index < size, index, 2 * size - 2 - index)


def disk(radius: float, softness: float) -> Tensor:
    """A filled circle with a soft edge, of sum 1: [k, k]."""
    reach = max(1, math.ceil(radius)) + 1
    along = torch.arange(-reach, reach + 1)
    circle = ((along[:, None].square() + along.square()) <= radius**2).float()
    edge = torch.exp(-0.5 * (torch.arange(-1, 2) / softness).square())
    edge = edge / edge.sum()
    kernel = F.conv2d(circle[None, None], (edge[:, None] * edge)[None, None], padding=1)[0, 0]
    return kernel / kernel.sum()


def moved(x: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """Blur along a direction, one for each image: half a Gaussian on a line, as a moving camera sees it."""
    scale = scale_of(x)
    reach = max(1, round(radius * scale))
    steps = torch.arange(reach + 1)
    weights = torch.exp(-0.5 * (steps / (sigma * scale)).square())
    weights = weights / weights.sum()
    angle = torch.deg2rad(degrees)[:, None]
    places = torch.stack([reach + steps * angle.sin(), reach + steps * angle.cos()], -1)  # [N, steps, 2]
    kernel = torch.zeros(len(x), 2 * reach + 2, 2 * reach + 2)
    low = places.floor().long()
    part = places - low
    image = torch.arange(len(x))[:, None].expand(-1, len(steps))
    for down in (0, 1):
        for across in (0, 1):
            share = (part[..., 0] - (1 - down)).abs() * (part[..., 1] - (1 - across)).abs()
            at = (image, low[..., 0] + down, low[..., 1] + across)
            kernel.index_put_(at, share * weights, accumulate=True)
    return filtered(x, kernel[:, : 2 * reach + 1, : 2 * reach + 1])


def zoomed(x: Tensor, factor: float) -> Tensor:
    """Magnify around the middle, linearly, at the same size."""
    theta = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


def resampled(x: Tensor, places: Tensor) -> Tensor:
    """Look images up at places [N, H, W, 2] in pixels (column, row), linearly, mirrored at the edge."""
    last = torch.tensor([max(1, x.shape[3] - 1), max(1, x.shape[2] - 1)])
    return F.grid_sample(x, 2 * places / last - 1, mode="bilinear", padding_mode="reflection", align_corners=True)


def scattered(x: Tensor, reach: int, times: int, generator: torch.Generator) -> Tensor:
    """Give each pixel the value of a near one, as through frosted glass; a margin stays as it is.

    The published images were made so: their code copies where it means to swap.
    """
    height, width = x.shape[2:]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    inner = (rows > reach) & (rows < height - reach) & (columns > reach) & (columns < width - reach)
    every = torch.arange(len(x))[:, None, None]
    for _ in range(times):
        down, across = torch.randint(-reach, reach, (2, len(x), height, width), generator=generator) * inner
        x = x.permute(0, 2, 3, 1)[every, rows + down, columns + across].permute(0, 3, 1, 2)
    return x


def clouds(n: int, size: torch.Size, decay: float, generator: torch.Generator) -> Tensor:
    """Smooth noise in octaves, each weaker than the coarser one by `decay`, scaled to [0, 1]: [n, 1, H, W]."""
    total = torch.zeros(n, 1, *size)
    amplitude, cells = 1.0, 2
    while cells <= 2 * max(size):
        coarse = torch.rand(n, 1, cells + 1, cells + 1, generator=generator)
        total += amplitude * F.interpolate(coarse, tuple(size), mode="bilinear", align_corners=True)
        amplitude, cells = amplitude / decay, 2 * cells
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return (total - low) / (high - low).clamp_min(1e-6)


def through_jpeg(x: Tensor, quality: int) -> Tensor:
    """Images as JPEG of this quality gives them back."""
    from PIL import Image

    def compressed(image: Any) -> Any:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return through_pillow(x, compressed)


def through_pillow(x: Tensor, change: Callable[[Any], Any]) -> Tensor:
    """Change images [N, 3, H, W] in [0, 1], each as one of Pillow's."""
    import numpy as np
    from PIL import Image

    arrays = x.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    changed = [np.asarray(change(Image.fromarray(array))) for array in arrays]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).float() / 255
