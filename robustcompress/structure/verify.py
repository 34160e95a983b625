"""Proves a traced structure on a copy before anyone relies on it."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from robustcompress.structure.auxiliary import expose, tensors_of
from robustcompress.structure.copies import sketches
from robustcompress.structure.groups import NEW, Axis, ChannelGroup, Edit
from robustcompress.structure.kinds import slots_of
from robustcompress.structure.layout import Layout
from robustcompress.structure.norms import mask_norm, masked, norms_over
from robustcompress.structure.readers import assumes, foreign_readers, misread
from robustcompress.structure.surgery import apply_gathers, plan_edit
from robustcompress.structure.twins import random_twin
from robustcompress.structure.watch import Watch, difference

TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-7}
"""Relative difference allowed in what a layer writes; a wrong channel makes one of 1e-3 or more. Where float32 doubts,
float64 decides."""

GROWTH = (3, 4, 5, 6, 7)
"""How many channels a group may gain."""

LOUD = 0.7
"""What new channels are scaled and shifted by, and what they weigh in all."""


def prove(model: nn.Module, layout: Layout, example: torch.Tensor) -> tuple[dict[str, str], dict[str, int]]:
    """Name the groups that cannot be resized without changing what the network computes, and those that must stay wide.

    On one copy with random weights every group is replaced by a gather of its own: about half of its channels, in
    another order, with new ones in between that nothing reads. Every layer, and the network, must give what they gave
    when the readers ignored the dropped channels. Only when that fails, groups are tried in smaller and smaller sets.
    Then all that can be resized are made as narrow as their layers allow, which some forwards do not, as where one
    squeezes.

    Args:
        model: The network; not touched.
        layout: Its traced structure.
        example: One input batch, `[N, 3, H, W]`.

    Returns:
        For each group that fails, the reason; and for each that cannot become as narrow as its layers would allow, the
        least width of those tried (1, 2, 4, ...) at which the network runs.
    """
    proof = _Proof(model, layout, example)
    broken = _find_broken(proof, layout)
    sound = [group for group in layout.groups.values() if group.editable and group.name not in broken]
    return broken, _find_least(proof, {group.name: group.min_width for group in sound}, layout.widths())


def _find_broken(proof: _Proof, layout: Layout) -> dict[str, str]:
    odd = proof.odd_norms()
    names = [name for name, group in layout.groups.items() if group.editable and name not in odd]
    if not names or not proof.complaint(names):
        return odd
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "#", name) + layout.groups[name].kind, []).append(name)
    broken = odd
    for some in alike.values():
        broken |= proof.sift(some)
    sound = [name for name in names if name not in broken]
    if sound and (complaint := proof.complaint(sound)):
        broken.update(dict.fromkeys(sound, f"together with other groups: {complaint}"))
    return broken


def _find_least(proof: _Proof, least: Mapping[str, int], widths: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in proof.too_narrow(least):
        width, most = 2 * least[name], widths[name] // 2
        while width < most and proof.too_narrow({name: width}):
            width *= 2
        found[name] = width
    return found


class _ShapeError(Exception):
    """Shapes do not fit: nothing that more precision would tell."""


@dataclass(frozen=True, slots=True)
class _Sketch:
    """An edited copy that ran, its images, and how wide its groups are."""

    net: nn.Module
    images: torch.Tensor
    widths: dict[str, int]


class _Proof:
    def __init__(self, model: nn.Module, layout: Layout, example: torch.Tensor) -> None:
        self._model, self._layout = model, layout
        generator = torch.Generator().manual_seed(0)
        self._images = torch.rand((2, *example.shape[1:]), generator=generator, dtype=torch.float64)
        self._batch = 1
        # What training calls as well is looked at beside evaluation, and may return more than the logits.
        self._modes: tuple[Sequence[str], ...] = ((), layout.auxiliary) if layout.auxiliary else ((),)
        self._changes = {name: _change(g, number) for number, (name, g) in enumerate(layout.groups.items())}
        self._ran: _Sketch | None = None

    def _noise(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._images[: self._batch].to(like.device, dtype)

    @torch.no_grad()
    def odd_norms(self) -> dict[str, str]:
        """Groups under a norm that does not do what its class promises: without a channel it may become anything."""
        layout, odd = self._layout, set[Axis]()
        if not layout.norm_dims:
            return {}
        dtype = next(self._model.parameters()).dtype
        net = expose(random_twin(self._model, dtype), self._modes[-1])

        def look(axis: Axis) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
                dim = layout.norm_dims[axis] % output.dim()
                again = masked(module, args[0], dim, args[0].new_ones(output.shape[dim]))
                if not difference(again, output) <= TOLERANCE[dtype]:
                    odd.add(axis)

            return hook

        for axis in layout.norm_dims:
            net.get_submodule(axis.module).register_forward_hook(look(axis))
        self._settle(net, dtype)
        return {
            name: f"{axis.module} is no plain norm, and takes statistics over its channels"
            for name, group in layout.groups.items()
            for axis in norms_over(layout, name)
            if axis in odd and group.editable
        }

    def _settle(self, net: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """What the network gives; a batch of two where it cannot do with one image."""
        try:
            return self._run(net, dtype)
        except Exception:  # such as a batch norm over a single vector
            if self._batch == 2:
                raise
            self._batch = 2
            return self._run(net, dtype)

    def _run(self, net: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)  # of a dropout that its module calls as a function, where only training calls that module
        return tensors_of(net(self._noise(next(net.parameters()), dtype)))

    def sift(self, names: Sequence[str]) -> dict[str, str]:
        """Which of these groups cannot be resized: halves are tried, and halves of halves."""
        complaint = self.complaint(names)
        if not complaint:
            return {}
        if len(names) == 1:
            return {names[0]: complaint}
        ends = {name: self.complaint([name]) for name in (names[0], names[-1])} if len(names) > 2 else {}
        if ends and all(ends.values()):  # groups of one name in every block: they fail alike
            return dict.fromkeys(names, ends[names[0]])
        half = len(names) // 2
        return self.sift(names[:half]) | self.sift(names[half:])

    def complaint(self, names: Sequence[str]) -> str:
        """What is wrong with resizing these groups together; empty when nothing is."""
        precise = next(self._model.parameters()).dtype == torch.float64
        try:
            for dtype in (torch.float64,) if precise else (torch.float32, torch.float64):
                tried = (self._tried(names, dtype, auxiliary) for auxiliary in self._modes)
                complaint = next(filter(None, tried), "") or self._misread(names, dtype)
                if not complaint:
                    return self._misfit(names)
        except _ShapeError as error:
            return str(error)
        return complaint

    @torch.no_grad()
    def _tried(self, names: Sequence[str], dtype: torch.dtype, auxiliary: Sequence[str]) -> str:
        layout, widths = self._layout, self._layout.widths()
        net = expose(random_twin(self._model, dtype), auxiliary)
        changes = {name: self._changes[name] for name in names}
        for name, sources in changes.items():
            silence_readers(net, layout, name, _kept(sources), widths)
        watch = Watch(net, layout)
        wanted = watch.note(lambda: self._settle(net, dtype))
        # What comes last in a network goes first: rows are dropped much more quickly than columns, and then there are
        # half as many columns to look at.
        for name, sources in reversed(changes.items()):
            edit = Edit(name, sources, "zero_out")
            watch.edited(name, sources, widths)
            tensors = plan_edit(net, layout, widths, edit)
            apply_gathers(net, layout, widths, edit, tensors)
            widths[name] = len(sources)
            for tensor in tensors:
                if tensor.side != "in":  # new channels are loud, so that whoever reads them is noticed
                    fresh = (tensor.index < 0).nonzero().flatten()
                    target = getattr(net.get_submodule(tensor.owner), tensor.tensor)
                    # The mean of what is read, not its sum: new channels read new ones, and single precision ends.
                    fan = target.select(tensor.dim, 0).numel() if tensor.first == "random" else 1
                    target.index_fill_(tensor.dim, fresh.to(target.device), LOUD / fan)
            leave_out(net, layout, name, [i for i, source in enumerate(sources) if source != NEW], widths)
        try:
            found = watch.compare(lambda: self._run(net, dtype))
        except Exception as error:  # the model's own code may raise anything where a width is not what it was
            raise _ShapeError(assumes(error)) from error
        if len(found) != len(wanted):
            raise _ShapeError(f"resizing it changes how many outputs there are, from {len(wanted)} to {len(found)}")
        pairs = list(zip(found, wanted, strict=True))
        for ours, theirs in pairs:
            if ours.shape != theirs.shape:
                shapes = f"from {tuple(theirs.shape)} to {tuple(ours.shape)}"
                raise _ShapeError(f"resizing it changes the output's shape {shapes}")
        worst, where = max(watch.worst, *((difference(ours, theirs), "the output") for ours, theirs in pairs))
        if not worst <= TOLERANCE[dtype]:
            return f"forward() mixes its channels (relative difference {worst:.1g} at {where} when it is resized)"
        return ""

    def _misread(self, names: Sequence[str], dtype: torch.dtype) -> str:
        """What is wrong with how layers that are not torch's read these groups; see `readers`."""
        foreign = foreign_readers(self._model, self._layout, names)
        if not foreign:
            return ""
        net = expose(random_twin(self._model, dtype), self._modes[-1])
        image = self._noise(next(net.parameters()), dtype)
        kept, widths = {name: _kept(self._changes[name]) for name in foreign}, self._layout.widths()

        def silence() -> None:
            for name, keep in kept.items():
                silence_readers(net, self._layout, name, keep, widths)

        complaint = misread(net, self._layout, kept, image, silence, TOLERANCE[dtype])
        readers = dict.fromkeys(reader for readers in foreign.values() for reader in readers)
        return f"{', '.join(readers)}: {complaint}" if complaint else ""

    def _misfit(self, names: Sequence[str]) -> str:
        """What is wrong with shapes where groups that became narrower are wider."""
        others: dict[str, tuple[int, ...]] = {}
        for name in names:
            sources, before = self._changes[name], self._layout.groups[name].width
            fewer = len(sources) < before
            others[name] = (*range(before), *[NEW] * sources.count(NEW)) if fewer else tuple(_kept(sources))
        return self._misshapen(others)

    def too_narrow(self, widths: Mapping[str, int]) -> list[str]:
        """The groups at whose widths here the network does not run: all are tried together, then halves, and so on."""
        if self._runs_narrowed(widths) or not self._misshapen(
            {name: tuple(range(width)) for name, width in widths.items()}, (True,)
        ):
            return []
        names = list(widths)
        halves = (names[: len(names) // 2], names[len(names) // 2 :]) if len(names) > 1 else ()
        found = [name for half in halves for name in self.too_narrow({name: widths[name] for name in half})]
        return found or names  # halves may run each by itself

    @torch.no_grad()
    def _runs_narrowed(self, least: Mapping[str, int]) -> bool:
        """Whether the copy on which shapes were found right last still runs when groups are narrowed further."""
        ran, self._ran = self._ran, None
        if ran is None:
            return False
        for name, width in least.items():
            if width < ran.widths[name]:
                apply_gathers(ran.net, self._layout, ran.widths, Edit(name, tuple(range(width)), "zero_out"))
                ran.widths[name] = width
        try:
            ran.net.train()(ran.images)
        except Exception:  # of the model's own code; which group it is, is seen on other copies
            return False
        return True

    @torch.no_grad()
    def _misshapen(self, changes: Mapping[str, tuple[int, ...]], modes: Sequence[bool] = (False, True)) -> str:
        """What is wrong with shapes after these changes, in evaluation, and in training; empty when nothing is."""
        layout = self._layout
        images = self._images.to(next(self._model.parameters()))
        for number, (net, x) in enumerate(sketches(self._model, images)):
            widths = layout.widths()
            for name, sources in changes.items():
                apply_gathers(net, layout, widths, Edit(name, sources, "zero_out"))
                widths[name] = len(sources)
            try:
                for training in modes:
                    net.train(training)(x)
            except Exception as error:  # of the widths, or of a forward that looks at values where there are none
                whole, _ = next(islice(sketches(self._model, images), number, None))
                with contextlib.suppress(Exception):
                    for training in modes:
                        whole.train(training)(x)
                    return assumes(error)
                continue
            self._ran = _Sketch(net, x, widths)
            return ""
        return ""


def _change(group: ChannelGroup, number: int) -> tuple[int, ...]:
    """A gather of a group, unlike those of other groups: what is only alike by chance, or at one width, shows."""
    draw = random.Random(number)
    width = group.width
    count = max(group.min_width, width // 2 - draw.randrange(1 + width // 8))
    # Neither the first nor the last channel stays where others can.
    shuffled = torch.randperm(max(0, width - 2), generator=torch.Generator().manual_seed(number)) + 1
    order = [*shuffled.tolist(), width - 1, 0] if width > 2 else [*range(width)][::-1]
    gained = draw.choice([n for n in GROWTH if count + n != width])
    sources = [*order[:count], *[NEW] * gained]
    draw.shuffle(sources)
    for end in (0, -1):  # what a forward does to a first or a last channel, it does to another one now
        old = next(i for i in range(len(sources))[:: 1 if end == 0 else -1] if sources[i] != NEW)
        sources[end], sources[old] = sources[old], sources[end]
    return tuple(sources)


def _kept(sources: Sequence[int]) -> list[int]:
    return sorted(source for source in sources if source != NEW)


@torch.no_grad()
def silence_readers(model: nn.Module, layout: Layout, group: str, keep: Iterable[int], widths: dict[str, int]) -> None:
    """Have nobody hear the channels of `group` outside `keep`: what pruning must equal.

    In every reader the weights that read one are zeroed; norms that take their statistics over the channels leave them
    out (see `norms`).
    """
    kept = set(keep)
    dropped = torch.tensor([c for c in range(widths[group]) if c not in kept], dtype=torch.long)
    for axis in layout.groups[group].readers:
        module = model.get_submodule(axis.module)
        positions = torch.isin(layout.owners(axis, group, widths), dropped).nonzero().flatten()
        for name, dim in slots_of(module, "in"):
            weight = getattr(module, name)
            weight.index_fill_(dim, positions.to(weight.device), 0)
    leave_out(model, layout, group, keep, widths)


def leave_out(model: nn.Module, layout: Layout, group: str, keep: Iterable[int], widths: dict[str, int]) -> None:
    """Have norms over the channels of `group` take their statistics over those in `keep` alone, from now on."""
    mask = torch.zeros(widths[group])
    mask[list(keep)] = 1
    for axis in norms_over(layout, group):
        module = model.get_submodule(axis.module)
        masks: dict[str, torch.Tensor] | None = module.__dict__.get("_left_out")
        if masks is None:
            masks = module.__dict__["_left_out"] = {}
            mask_norm(module, layout, axis, widths, masks.get)
        masks[group] = mask
