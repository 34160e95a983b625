"""Common corruptions (Hendrycks and Dietterich 2019), made here: fourteen of the fifteen, at five severities.

The strengths are those of CIFAR-10-C; lengths in pixels go with the image's side over 32. Exact up to the library that
does the arithmetic: the kinds of noise, defocus, glass and zoom blur, brightness, contrast, elastic, pixelate, JPEG.
Simplified, so that no image library beyond Pillow is needed: motion blur and snow (a Gaussian line in place of
ImageMagick's), fog (octaves of smooth noise in place of a plasma fractal).
Frost is left out: it needs the authors' photographs. So the mean is no published mCE, and is not called one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from robustcompress.artefact import blurs
from robustcompress.artefact.blurs import blurred, gaussian_kernel, resampled
from robustcompress.errors import InputError, nearest

SEVERITIES = (1, 2, 3, 4, 5)
_CHUNK = 64  # images at once: some corruptions hold several copies


def corrupt(pixels: Tensor, name: str, severity: int, *, seed: int = 0) -> Tensor:
    """Corrupt images; equal arguments give equal images.

    Args:
        pixels: uint8 [N, 3, H, W].
        name: One of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of the randomness.

    Returns:
        uint8 [N, 3, H, W], rounded as the published images are.

    Raises:
        InputError: The corruption or the severity does not exist.
    """
    if name not in CORRUPTIONS:
        raise InputError(f"corruption {name!r} is unknown{nearest(name, CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise InputError(f"severity={severity!r}: give 1 to 5")
    digest = hashlib.sha256(f"{seed} {name} {severity}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    parts = [
        CORRUPTIONS[name](chunk.float() / 255, severity - 1, generator).clamp(0, 1).mul(255).round().to(torch.uint8)
        for chunk in torch.split(pixels, _CHUNK)
    ]
    return torch.cat(parts)


def _noise(like: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape or like.shape, generator=generator)


def _gaussian_noise(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    return x + (0.04, 0.06, 0.08, 0.09, 0.10)[at] * _noise(x, generator)


def _shot_noise(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    photons = (500, 250, 100, 75, 50)[at]
    return torch.poisson(x * photons, generator) / photons


def _impulse_noise(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[at]
    hit, white = (torch.rand(x.shape, generator=generator) for _ in range(2))
    return torch.where(hit < share, (white < 0.5).float(), x)


def _defocus_blur(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    radius, softness = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[at]
    scale = blurs.scale_of(x)
    return blurs.filtered(x, blurs.disk(radius * scale, softness))


def _glass_blur(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    sigma, reach, times = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))[at]
    scale = blurs.scale_of(x)
    reach = max(1, round(reach * scale))
    return blurred(blurs.scattered(blurred(x, sigma * scale), reach, times, generator), sigma * scale)


def _motion_blur(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[at]
    angles = torch.empty(len(x)).uniform_(-45, 45, generator=generator)
    return blurs.moved(x, radius, sigma, angles)


def _zoom_blur(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    steps = (6, 11, 16, 21, 26)[at]
    zooms = [blurs.zoomed(x, 1 + step / 100) for step in range(steps)]
    return (x + torch.stack(zooms).sum(0)) / (steps + 1)


def _snow(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    mean, spread, zoom, least, radius, sigma, kept = (
        (0.1, 0.2, 1.0, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[at]
    layer = blurs.zoomed(mean + spread * _noise(x, generator, len(x), 1, *x.shape[2:]), zoom)
    layer = torch.where(layer < least, 0.0, layer).clamp(0, 1)
    layer = blurs.moved(layer, radius, sigma, torch.empty(len(x)).uniform_(-135, -45, generator=generator))
    grey = (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    pale = kept * x + (1 - kept) * torch.maximum(x, grey * 1.5 + 0.5)
    return pale + layer + layer.flip((2, 3))


def _fog(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    strength, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[at]
    brightest = x.amax((1, 2, 3), keepdim=True)
    haze = blurs.clouds(len(x), x.shape[2:], decay, generator)
    return (x + strength * haze) * brightest / (brightest + strength)


def _brightness(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """The value of HSV rises; hue and saturation stay, so that all three channels are scaled alike."""
    value = x.amax(1, keepdim=True)
    raised = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[at]).clamp_max(1)
    return torch.where(value > 0, x * raised / value.clamp_min(1e-6), raised)


def _contrast(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[at] + mean


def _elastic_transform(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    size = min(x.shape[2:])
    strength, sigma, jitter = (
        (0.0, 0.0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[at]
    middle, reach = torch.tensor([s // 2 for s in (x.shape[3], x.shape[2])]).float(), size // 3
    corners = torch.stack([middle + reach, middle + torch.tensor([reach, -reach]), middle - reach])
    shift = torch.empty(len(x), 3, 2).uniform_(-jitter * size, jitter * size, generator=generator)
    one = torch.ones(len(x), 3, 1)
    source, target = torch.cat([corners.expand(len(x), 3, 2), one], 2), torch.cat([corners + shift, one], 2)
    back = torch.linalg.solve(target, source[..., :2])  # [N, 3, 2]: places in the result to places in the image
    rows, columns = torch.meshgrid(*(torch.arange(s).float() for s in x.shape[2:]), indexing="ij")
    places = torch.stack([columns, rows, torch.ones_like(rows)], -1).flatten(0, 1) @ back  # [N, H W, 2]
    warped = resampled(x, places.view(len(x), *rows.shape, 2))
    if strength == 0:
        return warped
    field = torch.empty(len(x), 2, *rows.shape).uniform_(-1, 1, generator=generator)
    moved = blurs.separable(field, gaussian_kernel(sigma * size, truncate=3)) * strength * size
    return resampled(warped, torch.stack([columns, rows], -1) + moved.permute(0, 2, 3, 1))


def _pixelate(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    from PIL.Image import Resampling

    share = (0.95, 0.9, 0.85, 0.75, 0.65)[at]
    height, width = x.shape[2:]
    small = (max(1, int(width * share)), max(1, int(height * share)))
    return blurs.through_pillow(
        x, lambda image: image.resize(small, Resampling.BOX).resize((width, height), Resampling.BOX)
    )


def _jpeg_compression(x: Tensor, at: int, generator: torch.Generator) -> Tensor:
    return blurs.through_jpeg(x, (80, 65, 58, 50, 40)[at])


Corruption = Callable[[Tensor, int, torch.Generator], Tensor]

CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
"""By the names of the published benchmark."""

SIMPLIFIED = ("motion_blur", "snow", "fog")
MISSING = ("frost",)
