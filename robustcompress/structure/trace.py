"""Model to groups. The only file that imports torch_pruning.

torch-pruning's `DependencyGraph` runs the pass that is recorded: in evaluation mode, with gradients, once. The graph
that it then builds is not read. Which layers were called, what they were given and what they returned is noted by hooks
here, also of layers that it does not know; how channels get from one to the other is read off what autograd recorded
(see `couplings`, which says why). A network on which torch-pruning's own graph fails is none the worse for it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from robustcompress.errors import UnsupportedModelError
from robustcompress.structure.attention import Heads, find_heads
from robustcompress.structure.auxiliary import expose, tensors_of
from robustcompress.structure.copies import sketches
from robustcompress.structure.couplings import Couplings, Graph, Layer, Place, find_couplings
from robustcompress.structure.groups import Axis, ChannelGroup, Kind, Segment
from robustcompress.structure.kinds import kind_of
from robustcompress.structure.labels import distinct
from robustcompress.structure.layer_kind import LayerKind
from robustcompress.structure.layout import Layout, runs
from robustcompress.structure.parts import original_name
from robustcompress.structure.support import check_calls, check_exposed, check_supported, on


def trace(model: nn.Module, example: torch.Tensor) -> Layout:
    """Find the channel groups of a network.

    Of all but small networks the graph is built on a copy without values, wherever the forward permits that: nothing is
    computed, and no memory is taken.

    Args:
        model: The network. It is not touched.
        example: One input batch, `[N, 3, H, W]`.

    Returns:
        The groups and where they lie. Groups that cannot be edited say why.

    Raises:
        UnsupportedModelError: The network holds layers that cannot be edited, each named with its reason, or does not
            run, or does not return logits.
    """
    check_supported(model)
    heads = tuple(find_heads(model))
    graph = _graph(model, example)
    return replace(_layout(find_couplings(graph, heads), model, heads), auxiliary=graph.auxiliary)


def _graph(model: nn.Module, example: torch.Tensor) -> Graph:
    """What was recorded on a copy: torch-pruning leaves what it runs in eval mode, and autograd sees only gradients."""
    twins, failure = sketches(model, example), ""
    while True:
        mode = ""
        try:
            twin, images = next(twins)
            graph = _record(twin, images)
            mode = "in training mode "
            if auxiliary := check_calls(twin, images, graph.calls):
                calls, graph = graph.calls, _record(twin, images, auxiliary)
                check_exposed(twin, calls, auxiliary, graph.calls)
        except StopIteration:
            raise UnsupportedModelError(f"{type(model).__name__} cannot be edited: it does not run {failure}") from None
        except UnsupportedModelError:
            raise
        except Exception as error:  # the model's own code may raise anything, also where it is given no values
            failure = f"{mode}{on(example, error)}"
        else:
            return graph


def _record(twin: nn.Module, example: torch.Tensor, auxiliary: Sequence[str] = ()) -> Graph:
    import torch_pruning

    given: dict[nn.Module, Place | None] = {}
    returned: list[Place] = []
    written: dict[Any, tuple[nn.Module, int]] = {}
    calls: Counter[str] = Counter()

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[names[module]] += 1
        value = args[0] if args and isinstance(args[0], torch.Tensor) else None
        given[module] = None if value is None or value.grad_fn is None else (value.grad_fn, value.output_nr)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, torch.Tensor) and output.grad_fn is not None:
            if given[module] == (output.grad_fn, output.output_nr):  # it returned what it was given
                output = output.view_as(output)
            written[output.grad_fn] = (module, output.output_nr)
        return output

    def forward(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = expose(network, auxiliary)(images)
        tensors = tensors_of(out) if auxiliary or isinstance(out, torch.Tensor) else ()
        if not tensors or any(tensor.dim() != 2 or len(tensor) != len(images) for tensor in tensors):
            shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            mode, several = ("in training mode ", ", or a tuple of these") if auxiliary else ("", "")
            raise UnsupportedModelError(
                f"{type(twin).__name__} cannot be edited: {mode}it returns {shape}; it must return logits of shape "
                f"[batch, classes]{several}"
            )
        if tensors[0].grad_fn is None:
            raise UnsupportedModelError(
                f"{type(twin).__name__} cannot be edited: autograd sees no way from its parameters to what it returns; "
                "leave out no_grad() and detach() in forward()"
            )
        returned.extend((tensor.grad_fn, tensor.output_nr) for tensor in tensors if tensor.grad_fn is not None)
        return tensors

    names = {module: name for name, module in twin.named_modules() if kind_of(module) is not None}
    handles = [module.register_forward_pre_hook(before) for module in names]
    handles += [module.register_forward_hook(after) for module in names]
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # about plain parameters, whose dimension is found by what they meet
        # With a gradient the image itself is a node of the graph, so that its share of a concatenation is known.
        example = example.detach().clone().requires_grad_()
        try:
            graph.build_dependency(twin, example_inputs=example, forward_fn=forward, verbose=False)
        except Exception:
            # After the pass comes torch-pruning's own graph, which fails for a channel shuffle and some concatenations.
            if not returned:
                raise
    for handle in handles:
        handle.remove()
    inside = {id(p) for module in names for p in module.parameters(recurse=False)}
    return Graph(
        tuple(returned),
        {
            function: Layer(names[module], module, function, number, given[module])
            for function, (module, number) in written.items()
        },
        {id(p): name for name, p in twin.named_parameters() if id(p) not in inside},
        calls,
        tuple(auxiliary),
    )


@dataclass(frozen=True, slots=True)
class _Family:
    """Channels that are alike: they will be a group.

    Attributes:
        units: Int64 `[channels, ties]`: each channel is one unit, or several that are tied.
        axes: All axes that hold them.
    """

    units: torch.Tensor
    axes: tuple[Axis, ...]


def _families(couplings: Couplings, order: Mapping[str, int]) -> list[_Family]:
    """Units that lie equally often on the same axes, tied where they are equal parts of one writer."""
    axes = list(couplings.positions)
    count = 1 + max((int(units.max()) for units in couplings.positions.values() if len(units)), default=0)
    present = torch.zeros(count, dtype=torch.bool)
    pattern = torch.zeros(count, dtype=torch.long)
    where: list[set[Axis]] = [set()]
    for axis in axes:
        units = couplings.positions[axis]
        seen, _, copies = distinct(units[units >= 0])
        present[seen] = True
        # Patterns met so far are divided by how many positions their units have here.
        pairs, inverse, _ = distinct(pattern[seen] * (1 + int(copies.max())) + copies if len(seen) else seen)
        fresh = len(where)
        where.extend(where[old // (1 + int(copies.max()))] | {axis} for old in pairs.tolist())
        pattern[seen] = fresh + inverse
    if couplings.outputs:
        out = torch.tensor(sorted(couplings.outputs))
        out = out[present[out]]
        patterns, inverse, _ = distinct(pattern[out])
        fresh = len(where)
        where.extend(where[old] for old in patterns.tolist())
        pattern[out] = fresh + inverse
    alive = present.nonzero().flatten()
    alike: dict[int, list[int]] = {}
    for unit, number in zip(alive.tolist(), pattern[alive].tolist(), strict=True):
        alike.setdefault(number, []).append(unit)
    found = [
        _Family(
            torch.tensor(units)[:, None], tuple(sorted(where[number], key=lambda a: (order.get(a.module, -1), a.side)))
        )
        for number, units in alike.items()
    ]
    return _tie_parts(found, couplings.parted)


def _tie_parts(families: list[_Family], parted: set[int]) -> list[_Family]:
    """Tie equal parts of one writer (chunk, split): their widths may only change together."""
    merged: list[_Family] = []
    part_of: dict[tuple[Axis, int], int] = {}
    for family in families:
        writers = [
            axis for axis in family.axes if axis.side == "out" and parted.issuperset(family.units[:, 0].tolist())
        ]
        partner = next((part_of[key] for axis in writers if (key := (axis, len(family.units))) in part_of), None)
        if partner is None:
            part_of |= {(axis, len(family.units)): len(merged) for axis in writers}
            merged.append(family)
        else:
            tied = torch.cat([merged[partner].units, family.units], 1)
            axes = dict.fromkeys(merged[partner].axes + family.axes)
            merged[partner] = _Family(tied, tuple(axes))
    return merged


def _layout(couplings: Couplings, model: nn.Module, heads: Sequence[Heads]) -> Layout:
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    families = [f for f in _families(couplings, order) if any(axis.side == "out" for axis in f.axes)]
    count = 1 + max((int(f.units.max()) for f in families), default=0)
    group_of, channel_of = torch.full((count,), -1), torch.full((count,), -1)
    named: list[tuple[str, _Family]] = []
    widths: dict[str, int] = {}
    for number, family in enumerate(families):
        axes = sorted(family.axes, key=lambda axis: order.get(axis.module, -1))
        writer = next((a for a in axes if a.side == "out" and not _is_grouped(a, model)), axes[0]).module
        writer = original_name(model, writer)
        name, serial = writer, 1
        while name in widths:
            serial += 1
            name = f"{writer}#{serial}"
        widths[name] = len(family.units)
        named.append((name, _Family(family.units, tuple(axes))))
        group_of[family.units] = number
        channel_of[family.units] = torch.arange(len(family.units))[:, None]

    names = [name for name, _ in named]

    def segmented(units: torch.Tensor) -> tuple[torch.Tensor, tuple[Segment, ...] | None]:
        known = (units >= 0) & (units < count)
        owners = torch.where(known, group_of[units.clamp(0, count - 1)], -1)
        return owners, runs(owners, channel_of[units.clamp(0, count - 1)], names, widths)

    segments: dict[Axis, tuple[Segment, ...]] = {}
    irregular: set[str] = set()
    for axis, units in couplings.positions.items():
        owners, read = segmented(units)
        if read is None:
            irregular.update(names[number] for number in distinct(owners[owners >= 0])[0].tolist())
            read = (Segment(None, fixed=len(units)),)
        segments[axis] = read
    attention: dict[str, str] = {}
    for found in heads:
        number = int(group_of[couplings.positions[next(iter(found.axes))][0].clamp(0, count - 1)])
        if number >= 0 and widths[names[number]] == found.width:
            attention[names[number]] = found.module
            # With a single head its runs cannot be told apart by looking.
            segments |= {
                axis: tuple(replace(s, group=names[number]) for s in spans) for axis, spans in found.axes.items()
            }
    groups: dict[str, ChannelGroup] = {}
    outputs: list[str] = []
    for name, family in sorted(named, key=lambda pair: order.get(pair[0].split("#")[0], -1)):
        members = family.units.flatten().tolist()
        is_output = not couplings.outputs.isdisjoint(members)
        unclear = name in irregular or not couplings.opaque.isdisjoint(members)
        group = _describe(name, family, segments, model, is_output=is_output, unclear=unclear)
        told = name in attention and group.editable  # and so one head is as plain as many
        groups[name] = replace(group, kind="heads", min_width=1) if told else group
        outputs += [name] if not couplings.logits.isdisjoint(members) else []
    param_dims = dict(couplings.param_dims)
    for found in heads:
        param_dims |= found.param_dims
    norm_dims = {axis: dim for axis, dim in couplings.channel_dims.items() if _mixes(axis, model)}
    output = outputs[0] if len(outputs) == 1 else ""
    spans = {name: [segmented(units)[1] for units in several] for name, several in couplings.across.items()}
    across = {name: tuple(read for read in several if read is not None) for name, several in spans.items()}
    return Layout(groups, segments, param_dims, output, attention, norm_dims, _counts(model, segments), across)


_COUNTERS = {"torchvision.models.vision_transformer.VisionTransformer": ("conv_proj", "hidden_dim")}
"""Modules that count the channels of a layer inside them and reshape by the count: the layer, and the attribute."""


def _counts(model: nn.Module, segments: Mapping[Axis, tuple[Segment, ...]]) -> dict[str, tuple[tuple[str, str], ...]]:
    found: dict[str, tuple[tuple[str, str], ...]] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if (known := _COUNTERS.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            layer, attribute = known
            spans = segments.get(Axis(f"{name}.{layer}" if name else layer, "out"), ())
            if len(spans) == 1 and spans[0].group is not None:
                found[spans[0].group] = (*found.get(spans[0].group, ()), (name, attribute))
    return found


def _describe(
    name: str,
    family: _Family,
    segments: Mapping[Axis, tuple[Segment, ...]],
    model: nn.Module,
    *,
    is_output: bool,
    unclear: bool,
) -> ChannelGroup:
    readers = tuple(a for a in family.axes if a.side == "in" and not _is_grouped(a, model))
    writers = tuple(a for a in family.axes if a.side == "out" and not _is_grouped(a, model))
    passers = tuple(a for a in family.axes if a not in readers and a not in writers)
    kind: Kind = "hidden"
    reason = ""
    if is_output:
        kind, reason = "output", "holds the model's output"
    elif unclear:
        kind, reason = "frozen", "its channels pass through an operation in which they cannot be followed"
    elif not writers:
        kind, reason = "frozen", "no layer writes it"
    elif not readers:
        kind, reason = "frozen", "nothing reads it"
    elif family.units.shape[1] > 1:
        kind = "split"
    elif any(len({s.group for s in segments[a]} - {None}) > 1 for a in (*writers, *readers)):
        kind = "concat"
    elif len(writers) > 1:
        kind = "residual"
    # One channel of these is indistinguishable from an ordinary layer, or from one that all channels share.
    exact = not any(_mixes(axis, model) for axis in passers)
    min_width = 2 if not exact or any(_is_per_channel(axis, model) for axis in passers) else 1
    return ChannelGroup(name, len(family.units), kind, writers, readers, passers, min_width, reason, exact)


def _kind_at(axis: Axis, model: nn.Module) -> LayerKind | None:
    """The kind of the layer that an axis belongs to; None for a plain parameter."""
    return None if axis.side == "param" else kind_of(model.get_submodule(axis.module))


def _is_grouped(axis: Axis, model: nn.Module) -> bool:
    kind = _kind_at(axis, model)
    return kind is not None and kind.role == "grouped"


def _mixes(axis: Axis, model: nn.Module) -> bool:
    kind = _kind_at(axis, model) if axis.side == "both" else None
    return kind is not None and kind.mixes(model.get_submodule(axis.module))


def _is_per_channel(axis: Axis, model: nn.Module) -> bool:
    kind = _kind_at(axis, model)
    return axis.side == "param" or (
        kind is not None and (kind.role in ("depthwise", "prelu") or kind.parts is not None)
    )
