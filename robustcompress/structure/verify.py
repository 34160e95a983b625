"""Proves a traced structure on a copy before anyone relies on it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import nn

from robustcompress.structure.copies import copied, sketches
from robustcompress.structure.groups import NEW, Edit
from robustcompress.structure.kinds import slots_of, taught_kind
from robustcompress.structure.layout import Layout
from robustcompress.structure.norms import mask_norm, norms_over
from robustcompress.structure.readers import REFUSALS, foreign_readers, misread
from robustcompress.structure.surgery import apply_gathers, plan_edit
from robustcompress.structure.watch import Watch

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-7}
"""Relative difference allowed in what a layer writes; a wrong channel makes one of 1e-3 or more. Where float32 doubts,
float64 decides."""

GROWTH = 3
"""Channels that every group gains; odd, so that halves taken by a literal or a floor division show."""

LOUD = 0.7
"""What new channels weigh, are scaled and shifted by."""


def find_broken(model: nn.Module, layout: Layout, example: torch.Tensor) -> dict[str, str]:
    """Name the groups that cannot be resized without changing what the network computes.

    On one copy with random weights every group loses half of its channels and gains some that nothing reads, all at
    once; it must compute what it computed when the readers ignored the dropped channels. Only when that fails, groups
    are tried in smaller and smaller sets.

    Args:
        model: The network; not touched.
        layout: Its traced structure.
        example: One input batch, `[N, 3, H, W]`.

    Returns:
        For each group that fails, the reason.
    """
    proof = _Proof(model, layout, example)
    names = [name for name, group in layout.groups.items() if group.editable]
    if not names or not proof.complaint(names):
        return {}
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "#", name) + layout.groups[name].kind, []).append(name)
    broken: dict[str, str] = {}
    for some in alike.values():
        broken |= proof.sift(some)
    sound = [name for name in names if name not in broken]
    if sound and (complaint := proof.complaint(sound)):
        broken.update(dict.fromkeys(sound, f"together with other groups: {complaint}"))
    return broken


class _Proof:
    def __init__(self, model: nn.Module, layout: Layout, example: torch.Tensor) -> None:
        self._model, self._layout = model, layout
        self._image = torch.rand(
            (1, *example.shape[1:]), generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )

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
        for dtype in (torch.float64,) if precise else (torch.float32, torch.float64):
            complaint = self._tried(names, dtype) or self._misread(names, dtype)
            if not complaint:
                return self._misfit(names)
        return complaint

    def _change(self, name: str) -> tuple[list[int], int]:
        """The channels that a group keeps, and how many it gains; never as many as it lost."""
        width = self._layout.groups[name].width
        keep = _keep(width, self._layout.groups[name].min_width)
        return keep, GROWTH if len(keep) + GROWTH != width else GROWTH + 2

    @torch.no_grad()
    def _tried(self, names: Sequence[str], dtype: torch.dtype) -> str:
        layout, widths = self._layout, self._layout.widths()
        net = random_twin(self._model, dtype)
        image = self._image.to(next(net.parameters()).device, dtype)
        changes = {name: self._change(name) for name in names}
        for name, (keep, _) in changes.items():
            silence_readers(net, layout, name, keep, widths)
        watch = Watch(net, layout)
        wanted = watch.note(lambda: net(image))
        for name, (keep, gained) in changes.items():
            edit = Edit(name, (*keep, *[NEW] * gained), "zero_out")
            watch.edited(name, edit.sources, widths)
            tensors = plan_edit(net, layout, widths, edit)
            apply_gathers(net, layout, widths, edit, tensors)
            widths[name] = len(edit.sources)
            for tensor in tensors:
                if tensor.side != "in":  # new channels are loud, so that whoever reads them is noticed
                    fresh = (tensor.index < 0).nonzero().flatten()
                    target = getattr(net.get_submodule(tensor.owner), tensor.tensor)
                    target.index_fill_(tensor.dim, fresh.to(target.device), LOUD)
            leave_out(net, layout, name, range(len(keep)), widths)
        try:
            found = watch.compare(lambda: net(image))
        except REFUSALS as error:
            return _assumes(error)
        if found.shape != wanted.shape:
            return f"resizing it changes the output's shape from {tuple(wanted.shape)} to {tuple(found.shape)}"
        difference, where = watch.worst
        if not difference <= TOLERANCE[dtype]:
            return f"forward() mixes its channels (relative difference {difference:.1g} at {where} when it is resized)"
        return ""

    def _misread(self, names: Sequence[str], dtype: torch.dtype) -> str:
        """What is wrong with how layers that are not torch's read these groups; see `readers`."""
        foreign = foreign_readers(self._model, self._layout, names)
        if not foreign:
            return ""
        net = random_twin(self._model, dtype)
        image = self._image.to(next(net.parameters()).device, dtype)
        kept, widths = {name: self._change(name)[0] for name in foreign}, self._layout.widths()

        def silence() -> None:
            for name, keep in kept.items():
                silence_readers(net, self._layout, name, keep, widths)

        complaint = misread(net, self._layout, kept, image, silence, TOLERANCE[dtype])
        readers = dict.fromkeys(reader for readers in foreign.values() for reader in readers)
        return f"{', '.join(readers)}: {complaint}" if complaint else ""

    @torch.no_grad()
    def _misfit(self, names: Sequence[str]) -> str:
        """What is wrong with shapes where groups that became narrower are wider, and the other way round."""
        layout = self._layout
        image = self._image.to(next(self._model.parameters()))
        for number, (net, x) in enumerate(sketches(self._model, image)):
            widths = layout.widths()
            for name in names:
                keep, gained = self._change(name)
                fewer = len(keep) + gained < widths[name]
                sources = (*range(widths[name]), *[NEW] * GROWTH) if fewer else tuple(keep)
                apply_gathers(net, layout, widths, Edit(name, sources, "zero_out"))
                widths[name] = len(sources)
            try:
                net.eval()(x)
            except Exception as error:  # of the widths, or of a forward that looks at values where there are none
                whole, _ = next(islice(sketches(self._model, image), number, None))
                with contextlib.suppress(Exception):
                    whole.eval()(x)
                    return _assumes(error)
                continue
            return ""
        return ""


def _assumes(error: Exception) -> str:
    return f"forward() assumes its width ({str(error).splitlines()[0][:120] if str(error) else 'an assertion'})"


def _keep(width: int, min_width: int) -> list[int]:
    """Drop every second channel, and of the others the fifth, but leave as many as the group needs."""
    dropped = {c for c in [*range(1, width, 2), *range(8, width, 10)][: width - min_width]}
    return [c for c in range(width) if c not in dropped]


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


@torch.no_grad()
def random_twin(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy in eval mode with random weights and statistics.

    A zero-initialised layer, a dead unit or a fresh batch norm would hide what an edit does wrong until it is trained.
    """
    twin = copied(model, lambda t: torch.empty_like(t, dtype=dtype) if isinstance(t, nn.Parameter) else _as(t, dtype))
    draw = _Noise(dtype)
    for name, parameter in twin.eval().named_parameters():
        if parameter.dim() > 1 and not name.endswith("bias"):
            bound = (6 / max(1, parameter[0].numel())) ** 0.5
            draw.fill(parameter, -bound, bound)
        else:
            draw.fill(parameter, 0.5, 1.5)
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for tensor in (module.running_mean, module.running_var):
                if tensor is not None:
                    draw.fill(tensor, 0.5, 1.5)
        elif (kind := taught_kind(module)) is not None:
            for name in sorted({name for slots in kind.slots.values() for name, _ in slots} & module._buffers.keys()):
                if (tensor := module._buffers[name]) is not None and tensor.is_floating_point():
                    draw.fill(tensor, 0.5, 1.5)
    return twin


class _Noise:
    """Random numbers that begin again after a prime number of them: as good here, and much quicker."""

    PERIOD = 999_983

    def __init__(self, dtype: torch.dtype) -> None:
        self._values = torch.rand(self.PERIOD, generator=torch.Generator().manual_seed(1), dtype=dtype)
        self._next = 0

    def fill(self, tensor: torch.Tensor, low: float, high: float) -> None:
        count, flat = tensor.numel(), torch.empty(tensor.numel(), dtype=self._values.dtype)
        done = 0
        while done < count:
            size = min(count - done, self.PERIOD - self._next)
            torch.add(
                self._values.new_full((), low),
                self._values[self._next : self._next + size],
                alpha=high - low,
                out=flat[done : done + size],
            )
            done, self._next = done + size, (self._next + size) % self.PERIOD
        tensor.copy_(flat.view(tensor.shape))


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().clone().to(dtype) if tensor.is_floating_point() else tensor.detach().clone()
