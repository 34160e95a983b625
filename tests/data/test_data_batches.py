import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from robustcompress.data import Batches, Images, crop_flip
from robustcompress.errors import InputError


def numbered(n: int = 50, side: int = 16) -> Images:
    """Images that can be told apart: the label is the number of the image."""
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Images(pixels, torch.arange(n))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=25, deadline=None)
@given(side=st.integers(3, 9), padding=st.integers(0, 3), seed=st.integers(0, 99), data=st.data())
def test_crop_flip_against_a_loop(side: int, padding: int, seed: int, data: st.DataObject) -> None:
    shape = (4, data.draw(st.sampled_from([1, 3])), side, side + 1)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))
    rows, columns = torch.randint(2 * padding + 1, (2, 4), generator=seeded(seed))
    flip = torch.rand(4, generator=seeded(seed)) < 0.5
    moved = crop_flip(pixels, rows, columns, flip, padding=padding)
    for i in range(4):
        padded = F.pad(pixels[i], (padding,) * 4)
        crop = padded[:, rows[i] : rows[i] + side, columns[i] : columns[i] + side + 1]
        assert torch.equal(moved[i], crop.flip(-1) if flip[i] else crop)


@pytest.mark.parametrize("augment", ["none", "crop", "crop-flip"])
def test_each_epoch_holds_every_image_once(augment: str) -> None:
    images = numbered()
    batches = Batches(images, 16, augment=augment, generator=seeded(0))
    assert len(batches) == 4
    for _ in range(2):
        seen = [(x, y) for x, y in batches]
        assert [len(y) for _, y in seen] == [16, 16, 16, 2]
        assert sorted(torch.cat([y for _, y in seen]).tolist()) == list(range(50))
        for x, _ in seen:
            assert x.dtype == torch.float32 and float(x.min()) >= 0 and float(x.max()) <= 1
            assert x.is_contiguous(memory_format=torch.channels_last)
    assert [len(y) for _, y in Batches(images, 16, generator=seeded(0), drop_last=True)] == [16, 16, 16]


def test_pixels_are_those_of_the_label() -> None:
    images = numbered()
    for x, y in Batches(images, 16, generator=seeded(0), channels_last=False):
        assert x.is_contiguous()
        assert torch.equal(x, images.as_float()[y])


def test_without_generator_or_shuffle_the_order_is_kept() -> None:
    for batches in (Batches(numbered(), 16), Batches(numbered(), 16, generator=seeded(0), shuffle=False)):
        assert torch.cat([y for _, y in batches]).tolist() == list(range(50))


def test_streams_are_a_function_of_seed_and_epoch() -> None:
    def stream(batches: Batches) -> list[torch.Tensor]:
        return [torch.cat([x.flatten(1) for x, _ in batches])]

    def fresh(seed: int) -> Batches:
        return Batches(numbered(), 16, augment="crop-flip", generator=seeded(seed))

    first = fresh(0)
    epochs = [stream(first)[0] for _ in range(3)]
    assert not torch.equal(epochs[0], epochs[1])
    used = seeded(0)
    torch.rand(7, generator=used)  # the state does not count, the seed does
    torch.manual_seed(5)
    again = Batches(numbered(), 16, augment="crop-flip", generator=used)
    again.epoch = 2  # as after a restart
    assert torch.equal(stream(again)[0], epochs[2])
    assert again.epoch == 3
    assert not torch.equal(stream(fresh(1))[0], epochs[0])
    one = fresh(1)
    assert not torch.equal(stream(one)[0], epochs[1])  # seed 1 epoch 0 is not seed 0 epoch 1


def test_a_pass_can_start_in_the_middle() -> None:
    batches = Batches(numbered(), 16, augment="crop-flip", generator=seeded(3))
    whole = list(batches.iterate(4))
    rest = list(batches.iterate(4, start=2))
    assert len(rest) == 2
    for (x, y), (x2, y2) in zip(whole[2:], rest, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert batches.epoch == 0
    next(iter(batches))
    assert batches.epoch == 1  # a pass that is left early counts


def test_shifts_and_flips_are_spread_evenly() -> None:
    side, n = 16, 4000  # shifts by -2..2
    pixels = torch.zeros(n, 3, side, side, dtype=torch.uint8)
    pixels[:, :, 8, 5] = 255
    batches = Batches(Images(pixels, torch.zeros(n, dtype=torch.int64)), n, augment="crop-flip", generator=seeded(0))
    x, _ = next(iter(batches))
    place = x[:, 0].flatten(1).argmax(1)
    counts = torch.bincount(place, minlength=side * side).view(side, side).float()
    rows = counts.sum(1)
    assert rows.nonzero().flatten().tolist() == [6, 7, 8, 9, 10]
    assert float((rows[6:11] - n / 5).abs().max()) < 5 * (n * 0.16) ** 0.5  # five standard deviations
    plain, mirrored = counts[:, 3:8].sum(), counts[:, 8:13].sum()
    assert float(plain + mirrored) == n and abs(float(plain) - n / 2) < 5 * (n / 4) ** 0.5


def test_augmentation_is_cheap_against_a_training_step() -> None:
    images = numbered(128, 32)
    batches = Batches(images, 128, augment="crop-flip", generator=seeded(0))
    best = min(_seconds(lambda: list(batches)) for _ in range(5))
    assert best < 0.05  # 1.5 ms on the machine it was written on; a narrow network's step takes over 100 ms


def _seconds(work: object) -> float:
    start = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"batch_size": 0}, "batch_size=0: must be positive"),
        ({"batch_size": 51, "drop_last": True}, "there are only 50 images"),
        ({"augment": "crop-flop", "generator": seeded(0)}, "did you mean 'crop-flip'"),
        ({"augment": "crop"}, "needs a generator"),
        (
            {"images": Images(torch.empty(0, 3, 8, 8, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))},
            "no images",
        ),
    ],
)
def test_bad_input(change: dict[str, object], expected: str) -> None:
    arguments = {"images": numbered(), "batch_size": 16} | change
    with pytest.raises(InputError, match=expected):
        Batches(**arguments)  # type: ignore[arg-type]
