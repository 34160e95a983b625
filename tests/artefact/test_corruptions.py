from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustcompress.artefact import blurs
from robustcompress.artefact.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from robustcompress.errors import InputError


def picture(side: int = 32, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (side, side + 4), mode="bilinear")
    return image.mul(200).add(20).round().to(torch.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_is_the_same_twice_and_grows_with_severity(name: str) -> None:
    x = picture()
    found = [corrupt(x, name, severity) for severity in SEVERITIES]
    assert all(y.dtype == torch.uint8 and y.shape == x.shape for y in found)
    assert torch.equal(found[2], corrupt(x, name, 3))
    changes = [float((y.float() - x.float()).abs().mean()) for y in found]
    assert changes[-1] > 0.2
    if name not in ("elastic_transform", "glass_blur", "pixelate", "snow"):  # the published strengths are not monotone
        assert changes[-1] > changes[0]


@pytest.mark.parametrize("side", [8, 32, 61])
def test_sides_of_any_length_work(side: int) -> None:
    for name in CORRUPTIONS:
        assert corrupt(picture(side, 2), name, 5).shape == (2, 3, side, side + 4)


def test_the_noises_have_their_published_strengths() -> None:
    grey = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    noisy = corrupt(grey, "gaussian_noise", 4).float().sub(128).div(255)
    assert float(noisy.std()) == pytest.approx(0.09, rel=0.03)
    shot = corrupt(grey, "shot_noise", 5).float().sub(128).div(255)
    assert float(shot.std()) == pytest.approx((0.502 / 50) ** 0.5, rel=0.03)  # Poisson: variance is mean
    hit = corrupt(grey, "impulse_noise", 5)
    assert float((hit != 128).double().mean()) == pytest.approx(0.07, rel=0.1)
    assert set(hit.unique().tolist()) == {0, 128, 255}


def test_brightness_and_contrast_do_what_their_formulas_say() -> None:
    import colorsys

    x = picture(8, 1)
    bright = corrupt(x, "brightness", 3)
    for row, column in ((0, 0), (3, 7), (5, 2)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(x[0, :, row, column] / 255).tolist())
        wanted = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + 0.15))
        torch.testing.assert_close(bright[0, :, row, column].float(), torch.tensor(wanted) * 255, rtol=0, atol=0.51)
    flat = corrupt(x, "contrast", 5).float()
    mean = x.float().mean((2, 3), keepdim=True)
    torch.testing.assert_close(flat, (x.float() - mean) * 0.15 + mean, rtol=0, atol=0.51)


def test_blurs_keep_what_is_even_and_move_no_weight() -> None:
    even = torch.full((2, 3, 20, 24), 0.4)
    angles = torch.tensor([30.0, -80.0])
    for blurred in (
        blurs.blurred(even, 1.3),
        blurs.filtered(even, blurs.disk(1.5, 0.1)),
        blurs.moved(even, 6, 2, angles),
        blurs.zoomed(even, 1.2),
    ):
        torch.testing.assert_close(blurred, even)
    point = torch.zeros(1, 1, 33, 33)
    point[0, 0, 16, 16] = 1
    trace = blurs.moved(point, 8, 4, torch.tensor([0.0]))
    assert float(trace.sum()) == pytest.approx(1) and float(trace[0, 0, 16].sum()) == pytest.approx(1)
    assert float(trace[0, 0, 16, 16]) == float(trace.max())


def test_a_gaussian_blur_is_scipys() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    x = picture(20, 1).float() / 255
    wanted = ndimage.gaussian_filter(x[0].numpy(), (0, 1.1, 1.1), mode="mirror", truncate=4)
    torch.testing.assert_close(blurs.blurred(x, 1.1)[0], torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'fog'"):
        corrupt(picture(), "frog", 1)
    with pytest.raises(InputError, match="severity=6"):
        corrupt(picture(), "fog", 6)
