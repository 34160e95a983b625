"""Distances between masks: against masks that were drawn, carried out as edits, and compared bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import robustcompress as rc
from robustcompress.structure import Edit
from tests.strategies.nets import build, small_data

SPEC = rc.ModelSpec("resnet8", {"stem_stride": 4})
WIDTHS = {g.name: g.width for g in rc.StructuralEditor(SPEC.build(), torch.zeros(2, 3, 32, 32)).editable}


@pytest.fixture(scope="module")
def plain() -> rc.CompressResult:
    """A result whose masks the tests replace."""
    data = rc.load_data("digits", train_limit=64, test_limit=20)
    recipe = rc.Recipe(batch_size=32, val_images=0)
    return rc.compress(
        SPEC, "none", data=data, epochs=0.1, recipe=recipe, attacks=(), progress=False, objective="natural"
    )


def with_edits(plain: rc.CompressResult, edits: Sequence[Edit]) -> rc.CompressResult:
    return replace(plain, edits=tuple(edits), budget={"macs": 0.5})


masks = st.fixed_dictionaries(
    {name: st.lists(st.booleans(), min_size=width, max_size=width) for name, width in WIDTHS.items()}
)


def gathers(mask: dict[str, list[bool]], *, pieces: int) -> list[Edit]:
    """Leads to a mask in several steps, through channels that are put in another order and fresh ones."""
    edits: list[Edit] = []
    for name, bits in mask.items():
        kept, now = [c for c, bit in enumerate(bits) if bit], list(range(len(bits)))
        for step in range(pieces):
            rest = [c for c in now if c not in kept]
            following = [*reversed([c for c in now if c in kept]), *rest[: len(rest) // 2]]
            following = following if step + 1 < pieces else [c for c in following if c in kept]
            edits.append(Edit(name, (*(now.index(c) for c in following), *[rc.NEW] * step)))
            now = [*following, *[-1 - step] * step]
    return edits


@settings(deadline=None, max_examples=20)
@given(a=masks, b=masks, pieces=st.integers(1, 3))
def test_channels_are_followed_through_all_gathers(
    plain: rc.CompressResult, a: dict[str, list[bool]], b: dict[str, list[bool]], pieces: int
) -> None:
    one, two = with_edits(plain, gathers(a, pieces=pieces)), with_edits(plain, gathers(b, pieces=1))
    differ = sum(p != q for name in WIDTHS for p, q in zip(a[name], b[name], strict=True))
    assert rc.hamming(one, two) == rc.hamming(two, one) == pytest.approx(differ / sum(WIDTHS.values()))
    assert rc.hamming(one, one) == 0


def test_groups_without_edits_and_the_classes_count_as_kept(plain: rc.CompressResult) -> None:
    name, width = next(iter(WIDTHS.items()))
    halved = with_edits(plain, [Edit("fc", (rc.NEW,) * 3), Edit(name, tuple(range(width // 2)))])
    assert rc.hamming(halved, plain) == pytest.approx((width - width // 2) / sum(WIDTHS.values()))
    doubled = with_edits(plain, [Edit(name, (*range(width), *range(width)))])
    assert rc.hamming(doubled, plain) == 0, "a channel that is there twice is there"


def weighted(plain: rc.CompressResult, seed: int, density: float) -> rc.CompressResult:
    model, generator = SPEC.build(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.weight.fill_(1.0).mul_(torch.rand(module.weight.shape, generator=generator) < density)
    return replace(plain, model=model, budget={"density": density})


@settings(deadline=None, max_examples=10)
@given(seeds=st.lists(st.integers(0, 99), min_size=2, max_size=4, unique=True), density=st.floats(0.02, 0.9))
def test_weights_are_compared_by_their_zeros(plain: rc.CompressResult, seeds: list[int], density: float) -> None:
    results = {str(seed): weighted(plain, seed, density) for seed in seeds}
    found = rc.stability(results)
    flat = [
        torch.cat([p.flatten() for n, p in r.model.named_parameters() if p.dim() > 1]).detach()
        for r in results.values()
    ]
    wanted = [[float((a != b).double().mean()) for b in flat] for a in flat]
    assert found.names == tuple(results)
    assert torch.allclose(torch.tensor(found.matrix), torch.tensor(wanted))
    pairs = [wanted[i][j] for i in range(len(flat)) for j in range(i)]
    assert found.mean == pytest.approx(sum(pairs) / len(pairs))
    assert found.mean == pytest.approx(found.chance, abs=0.02), "these are drawn at random"


def test_chance_is_what_masks_drawn_at_random_come_to(plain: rc.CompressResult) -> None:
    """By drawing: two results keep other numbers of channels of each group."""
    generator = torch.Generator().manual_seed(0)

    def drawn(share: float) -> list[Edit]:
        return [
            Edit(name, tuple(torch.randperm(width, generator=generator)[: max(1, int(share * width))].tolist()))
            for name, width in WIDTHS.items()
        ]

    found = [rc.stability({"a": with_edits(plain, drawn(0.25)), "b": with_edits(plain, drawn(0.7))}) for _ in range(15)]
    assert len({f.chance for f in found}) == 1
    assert sum(f.mean for f in found) / len(found) == pytest.approx(found[0].chance, abs=0.02)


def test_searches_of_one_network_are_compared_as_they_were_recorded() -> None:
    """The distance from a search of nothing is what the search said that it changed."""
    settings: dict[str, Any] = {
        "data": small_data(), "epochs": 4.0, "recipe": rc.Recipe(batch_size=32, val_images=0), "attacks": (),
        "progress": False, "pretrained": True, "objective": "natural",
    }  # fmt: skip
    for granularity, budget in (("channel", rc.Budget(macs=0.5)), ("weight", rc.Budget(density=0.2))):
        made = [
            rc.compress(
                build("chain"),
                rc.Hydra(search=search, score_lr=0.3, granularity=granularity),
                budget=budget,
                **settings,
            )
            for search in (0.5, 0.0)
        ]
        said = next(record["changed"] for record in made[0].history if record.get("event") == "scores")
        assert rc.hamming(*made, reference=build("chain")) == pytest.approx(said) and said > 0


def test_what_cannot_be_compared_is_said(plain: rc.CompressResult) -> None:
    other, nameless = replace(plain, spec=rc.ModelSpec("resnet8")), replace(plain, spec=None)
    for results, options, said in (
        ({"a": plain}, {}, "1 results have no distance"),
        ({"a": plain, "b": other}, {}, r"b began with .*resnet8.*, a with"),
        ({"a": plain, "b": nameless}, {}, "a model of one's own"),
        ({"a": nameless, "b": nameless}, {}, "pass reference="),
        ({"a": plain, "b": weighted(plain, 0, 0.5)}, {}, "b is a choice of single weights, a of channels"),
        ({"a": nameless, "b": with_edits(nameless, [Edit("layers.0.0.conv1", (900,))])}, {"reference": SPEC.build()},
         "the edits of b do not fit"),
    ):  # fmt: skip
        with pytest.raises(rc.InputError, match=said):
            rc.stability(results, **options)  # type: ignore[arg-type]
    assert rc.hamming(nameless, nameless, reference=SPEC.build()) == 0
