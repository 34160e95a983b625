"""StructuralEditor: the one way in which this package changes a network's shape."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from robustcompress.errors import InputError
from robustcompress.structure.checks import channels, check_resize, check_size
from robustcompress.structure.depth import BypassProof
from robustcompress.structure.factorisation import (
    carry_out_factors,
    check_factors,
    make_factors,
    prove_factors,
    survey_factorised,
)
from robustcompress.structure.gates import Gates, open_gates
from robustcompress.structure.groups import NEW, AnyEdit, Bypass, ChannelGroup, Edit, Factorise, Insert, batches_of
from robustcompress.structure.initial import fill, resolve_clones
from robustcompress.structure.insertion import Wanted, carry_out, places_for_parts, plan_parts, survey_with
from robustcompress.structure.layout import Layout
from robustcompress.structure.masks import MaskRule
from robustcompress.structure.parts import parts_of
from robustcompress.structure.sites import Sites
from robustcompress.structure.surgery import Twin, apply_gathers, plan_edit, remove_everywhere, resize_followers
from robustcompress.structure.survey import Survey, survey


class StructuralEditor:
    """Resizes the channel groups of a network in place, takes whole blocks out, and has everything follow that must.

    Growing and pruning are the same edit: new channel `i` is old channel `sources[i]`, or fresh where `NEW`.

        editor.resize("layer1.0.conv1", [0, 2, 3])                 # prunes
        editor.resize("layer1.0.conv1", [0, 1, 2, 3, NEW, NEW])    # grows

    A residual block whose shape allows it leaves the network by `bypass`.

    The model is traced once, on a copy, and the traced structure is verified on a copy by resizing every group at once
    and comparing with the same network whose readers ignore the dropped channels; groups for which that fails are
    marked as not editable, with the reason. Edits keep training mode, frozen parameters, gradients and buffers.

    Args:
        model: Any network that maps images to logits in one forward pass, each layer called once. Copies of it are run,
            of a large network also without values (on torch's meta device): what a forward keeps outside its module
            sees those.
        example: One input batch `[N, 3, H, W]` on any device.
        round_to: Widths must be multiples of this.
        seed: Seeds the values of new channels.

    Raises:
        UnsupportedModelError: Naming every layer that cannot be edited, each with its reason.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor, *, round_to: int = 1, seed: int = 0) -> None:
        if round_to < 1:
            raise InputError(f"round_to={round_to}: must be at least 1")
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.dtype in (torch.float32, torch.float64):
            example = example.detach().to(parameter.device, parameter.dtype)
            # torch-pruning needs a batch of at least two: with one image, squeezed dimensions look alike.
            example = torch.cat([example, example]) if example.dim() > 0 and len(example) == 1 else example
        self.model = model
        self.round_to = round_to
        if example.dim() > 0 and len(example) == 0:
            raise InputError("the example holds no image; give a batch of at least one")
        found = survey(model, example)
        self.layout: Layout = found.layout
        self._broken = found.broken
        self._widths = self.layout.widths()
        self._generator = torch.Generator().manual_seed(seed)
        self._edits: list[AnyEdit] = []
        self._image_shape = example.shape[1:]
        self._bypassable: tuple[str, ...] | None = None
        self._insertable: tuple[str, ...] | None = None
        self._followers: list[Twin] = []

    @property
    def groups(self) -> Mapping[str, ChannelGroup]:
        """Every channel group with its present width, in the model's order."""
        return MappingProxyType(Survey(self.layout, self._broken).groups(self._widths))

    @property
    def editable(self) -> tuple[ChannelGroup, ...]:
        """The groups that `resize` accepts."""
        return tuple(group for group in self.groups.values() if group.editable)

    @property
    def widths(self) -> dict[str, int]:
        """The present width of every group."""
        return dict(self._widths)

    @property
    def edits(self) -> tuple[AnyEdit, ...]:
        """Every edit so far, in order: with the reference model's factory this is the whole structure."""
        return tuple(self._edits)

    @property
    def bypassed(self) -> tuple[str, ...]:
        """The blocks, and inserted parts, that have left so far, in order."""
        return tuple(edit.module for edit in self._edits if isinstance(edit, Bypass))

    @property
    def inserted(self) -> tuple[Insert, ...]:
        """What was inserted so far, in order, also where it has left since."""
        return tuple(edit for edit in self._edits if isinstance(edit, Insert))

    @property
    def rebuilt(self) -> tuple[AnyEdit, ...]:
        """The edits so far after which the network was traced anew: what was inserted, and what was factorised."""
        return tuple(edit for edit in self._edits if isinstance(edit, Insert | Factorise))

    @property
    def parts(self) -> dict[str, str]:
        """The parts in the network, by name: the kind of each."""
        return parts_of(self.model)

    @property
    def insertable(self) -> tuple[str, ...]:
        """The blocks in which `insert` can put a part, in the model's order: of blocks inside blocks, the innermost."""
        if self._insertable is None:
            with torch.inference_mode(False):
                self._insertable = places_for_parts(self.model, self._example(), self.layout.auxiliary)
        left, gone = {name for name, _ in self.model.named_modules()}, self.bypassed
        return tuple(name for name in self._insertable if name in left and name not in gone)

    @property
    def bypassable(self) -> tuple[str, ...]:
        """The blocks that `bypass` accepts, in the model's order: of blocks inside blocks, the innermost.

        Each is proven when this is first asked for, which takes a few forward passes a block. `bypass` also accepts
        what several of them make up, such as a stage without a projection.
        """
        if self._bypassable is None:
            with torch.inference_mode(False):
                self._bypassable = BypassProof(self.model, self._image_shape, self.layout.auxiliary).innermost()
        left = {name for name, _ in self.model.named_modules()}
        gone = self.bypassed
        return tuple(name for name in self._bypassable if name in left and name not in gone)

    @property
    def generator(self) -> torch.Generator:
        """What the values of new channels are drawn from."""
        return self._generator

    def resize(self, group: str, sources: Sequence[int], *, init: str | None = None, share: bool = False) -> Edit:
        """Replace a group by a gather of itself.

        Args:
            group: The group's name.
            sources: For each new channel the old one it is, or `NEW`.
            init: How fresh channels begin; "pair" when there are any and nothing is said.
            share: Divide the readers' weights of a channel that appears several times among its copies, so that
                duplication changes no output.

        Returns:
            The edit, as recorded.

        Raises:
            InputError: Unknown or frozen group, a source that does not exist, an unknown `init`, or a width that is
                zero or no multiple of `round_to`. Nothing has changed then.
        """
        sources = channels(sources)
        check_resize(self.groups, self.round_to, group, sources, init)
        if init is None and NEW in sources:
            init = "pair"
        if init == "clone":
            sources, share = resolve_clones(sources, self._generator), True
        return self._carry_out(Edit(group, sources, init if NEW in sources or init == "clone" else None, share))

    def prune(self, group: str, keep: Iterable[int]) -> Edit:
        """Keep the channels named in `keep`, in ascending order, and drop the others."""
        return self.resize(group, sorted(set(channels(keep))))

    def grow(self, group: str, extra: int, *, init: str = "pair") -> Edit:
        """Append `extra` new channels, begun as `init` says."""
        if extra < 1:
            raise InputError(f"grow({group!r}, extra={extra}): must be at least 1")
        width = self._widths.get(group, 0)
        return self.resize(group, [*range(width), *[NEW] * extra], init=init)

    def resize_output(self, num_classes: int) -> Edit:
        """Replace the classifier by a fresh one with `num_classes` outputs; recorded and replayed like any edit.

        Classifiers that only training uses are replaced as well, each by an edit of its own.

        Returns:
            The edit of the classifier.
        """
        if num_classes < 2:
            raise InputError(f"num_classes={num_classes}: must be at least 2")
        if not self.layout.output:
            raise InputError("the model's output is not written by one convolution or linear layer: replace it by hand")
        main, *others = (self.layout.output, *(name for name in self.layout.outputs if name != self.layout.output))
        if parts := [name for name in others if self._widths[name] != self._widths[main]]:
            raise InputError(f"{', '.join(parts)}: part of a classifier that only training uses; replace it by hand")
        edit = self._carry_out(Edit(main, (NEW,) * num_classes, "kaiming"))
        for name in others:
            self._carry_out(Edit(name, edit.sources, edit.init))
        return edit

    def bypass(self, module: str) -> Bypass:
        """Replace a residual block by the identity: what it is given goes out unchanged.

        Before anything is done it is proven, on a copy with random weights, that the block is the identity once its
        residual branch is silent, and that the network then computes the same without it.

        Args:
            module: The block's name (see `bypassable`).

        Returns:
            The edit, as recorded. Groups that lived inside the block are gone from `groups` and `widths`; those it
            shared with the rest have lost its layers, and keep their names, also where that is a layer's that left.

        Raises:
            InputError: There is no such block, or it is not the identity when its branch is silent; with the reason.
                Nothing has changed then.
        """
        with torch.inference_mode(False):
            # What was proven stays so: with a block gone that is as if its branch were silent, for which it was proven.
            # Of a part nothing is to be proven: without it stands what stood there before it.
            proven = (self._bypassable is not None and module in self.bypassable) or module in self.parts
            if not proven:
                proof = BypassProof(self.model, self._image_shape, self.layout.auxiliary)
                if complaint := proof.complaint(module):
                    raise InputError(f"the bypass was refused: {complaint}")
            return self._carry_out_bypass(Bypass(module))

    def insert(self, block: str, kind: str) -> Insert:
        """Insert a part into the residual branch of a block, before the sum. The network computes what it computed.

        "se" is residual squeeze-and-excitation, "rir" a small residual branch within the branch (see `parts`). Both
        are `x + f(x)` with an `f` that begins at zero. What is inserted is part of the network from then on: traced and
        proven with it, its hidden channels a group of their own. `bypass` takes it out again, by its name (see
        `parts`).

        Args:
            block: The block's name (see `insertable`); beside those that `bypass` accepts, also blocks whose shortcut
                is a projection.
            kind: "se" or "rir".

        Returns:
            The edit, as recorded. Groups that were there keep their names.

        Raises:
            InputError: There is no such kind or block, the block has no place for a part, or has it already; with the
                reason. Nothing has changed then.
        """
        return self.insert_all([(block, kind)])[0]

    def insert_all(self, parts: Iterable[tuple[str, str]]) -> tuple[Insert, ...]:
        """As `insert`, for several blocks and kinds at once: traced and proven once for all.

        Returns:
            The edits, one for each part.

        Raises:
            InputError: For any of them; nothing has changed then.
        """
        return self._insert([(block, kind, None) for block, kind in parts])

    def factorise(self, layers: Factorise | Iterable[Factorise]) -> tuple[Factorise, ...]:
        """Replace layers by products of smaller ones, which approximate them: by Tucker, CP or singular values.

            editor.factorise([Factorise("layers.1.0.conv1", "tucker", (16, 16))])

        Ranks are channel groups from then on, under the names of the factors that write them.

        Args:
            layers: One or several, each once: plain convolutions without groups, and linear layers (see `factors`).

        Returns:
            The edits, as recorded. Groups that were there keep their names.

        Raises:
            InputError: A layer that cannot be factorised so, or that the model does more with than to call it; all are
                named. Nothing has changed then.
        """
        return self._factorise((layers,) if isinstance(layers, Factorise) else tuple(layers), blank=False)

    def gates(self, scores: Mapping[str, torch.Tensor], rule: MaskRule | None = None) -> Gates:
        """Open a context in which the groups named in `scores` are gated where they are read.

        Args:
            scores: Per group, its first scores `[C]`; each becomes a parameter on the model's device.
            rule: Turns scores into gate values (see `masks.TopK`); the scores themselves by default.

        Raises:
            InputError: A group that does not exist or cannot be edited, or scores of the wrong length.
        """
        return open_gates(self.model, self.layout, self.groups, scores, rule)

    def follow(self, *twins: Twin) -> None:
        """Have every later edit also carried out on these optimizers and twins (EMA models, proxies)."""
        self._followers.extend(t for t in twins if not any(t is known for known in self._followers))

    def unfollow(self, *twins: Twin) -> None:
        """Stop following; twins that are not followed are ignored."""
        self._followers = [known for known in self._followers if not any(known is t for t in twins)]

    def fork(self) -> StructuralEditor:
        """A copy of the network as it is now, and its editor: nothing is traced or proven again, and nothing follows.

        Edits of either leave the other as it is. The copy's edits go on from these.
        """
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        twin._widths, twin._edits, twin._followers = dict(self._widths), list(self._edits), []
        twin._generator = self._generator.clone_state()
        return twin

    @classmethod
    def replay(
        cls, model: nn.Module, example: torch.Tensor, edits: Iterable[AnyEdit], *, most: int | None = None
    ) -> StructuralEditor:
        """Carry a list of edits out on a fresh reference model, in place; `most` bounds how many numbers it may hold.

        New channels get arbitrary values: load the saved weights afterwards, with `strict=True`.

        Returns:
            The editor, ready for more edits.

        Raises:
            InputError: If an edit does not fit this model, or makes it larger than `most`.
        """
        editor = cls(model, example)
        for batch in batches_of(edits):
            for edit in batch:
                check_size(model, editor.layout, editor._widths, edit, most)
            editor._repeat(batch, most)
        return editor

    def _repeat(self, batch: Sequence[AnyEdit], most: int | None) -> None:
        """Carry out one edit, or several of a kind that are traced at once."""
        self._insert([(edit.module, edit.kind, edit.width) for edit in batch if isinstance(edit, Insert)])
        self._factorise([edit for edit in batch if isinstance(edit, Factorise)], blank=True, most=most)
        for edit in batch:
            if isinstance(edit, Bypass):
                self.bypass(edit.module)
            elif isinstance(edit, Edit):
                if edit.group not in self.layout.outputs or not self.layout.output:
                    # A clone's sources were resolved when it was made, so it is replayed as the gather it became.
                    check_resize(self.groups, 1, edit.group, edit.sources, None)
                self._carry_out(edit)

    @torch.inference_mode(False)
    def _carry_out(self, edit: Edit) -> Edit:
        tensors = plan_edit(self.model, self.layout, self._widths, edit)
        new_widths = {**self._widths, edit.group: len(edit.sources)}
        replaced = apply_gathers(self.model, self.layout, self._widths, edit, tensors)
        fill(self.model, self.layout, new_widths, edit, tensors, self._generator)
        resize_followers(self._followers, self.model, self.layout, self._widths, edit, tensors, replaced)
        self._widths = new_widths
        self._edits.append(edit)
        return edit

    @torch.inference_mode(False)
    def _insert(self, wanted: Sequence[Wanted]) -> tuple[Insert, ...]:
        if not wanted:
            return ()
        generator = self._generator.clone_state()
        plan = plan_parts(Sites(self.model, self._image_shape, self.layout.auxiliary), wanted, generator)
        found = survey_with(self.model, self._example(), plan, self.groups)
        carry_out(self.model, self._followers, plan)
        self.layout, self._broken, self._widths = found.layout, found.broken, found.layout.widths()
        self._generator.set_state(generator.get_state())
        edits = tuple(new.edit for new in plan)
        self._edits.extend(edits)
        return edits

    @torch.inference_mode(False)
    def _factorise(self, edits: Sequence[Factorise], *, blank: bool, most: int | None = None) -> tuple[Factorise, ...]:
        if edits:
            check_factors(self.model, edits, most)
            made = make_factors(self.model, edits, blank=blank)
            prove_factors(self.model, self._image_shape, self.layout.auxiliary, made)
            found = survey_factorised(self.model, self._example(), made, self.groups)
            carry_out_factors(self.model, self._followers, made)
            self.layout, self._broken, self._widths = found.layout, found.broken, found.layout.widths()
            self._bypassable = self._insertable = None
            self._edits.extend(edits)
        return tuple(edits)

    def _example(self) -> torch.Tensor:
        return next(self.model.parameters()).detach().new_zeros((2, *self._image_shape))

    def _carry_out_bypass(self, edit: Bypass) -> Bypass:
        remove_everywhere(self.model, self._followers, edit.module)
        self.layout = self.layout.without(edit.module, self._widths)
        self._widths = {name: self._widths[name] for name in self.layout.groups}
        self._edits.append(edit)
        return edit
