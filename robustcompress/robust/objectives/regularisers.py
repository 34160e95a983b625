"""Regularisers: what may be added to the loss of any objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustcompress.robust.objectives.parts import check_options
from robustcompress.robust.objectives.penultimate import classifier_of, features, shifted, still

_TINY = 1e-12


class Regulariser(ABC):
    """A penalty on one batch. Abstract: the concrete ones are final, frozen dataclasses of their options.

    Its passes see the model in the mode it is in, and move no running statistics: with a weight near zero, training is
    what it was without.
    """

    name: ClassVar[str]
    weight: float

    @abstractmethod
    def penalty(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The penalty, a scalar with its graph, before it is weighted.

        Args:
            model: Maps images to logits.
            x: Clean images, [N, C, H, W].
            x_adv: The same, attacked.
            y: Labels, int64 [N].
        """

    def options(self) -> dict[str, Any]:
        """The options as plain data."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # each is a dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class JacobianNorm(Regulariser):
    """Half the squared Frobenius norm of d logits / d image (Hoffman et al. 2019, section 2.2 and algorithm 1).

    Mean over the clean images, estimated by random projections: for unit vectors v of K dimensions,
    `K |v J|^2` is the norm squared on average. The projections are drawn from the bits of the attacked images, so that
    two looks at one batch (an ascent, a resumed run) draw the same. Costs a pass, and for each projection a gradient to
    the images that is differentiated in turn.

    Attributes:
        weight: The paper's lambda; 0.01 is its own for digits of MNIST.
        projections: How many v; the paper finds one to be enough.
    """

    name: ClassVar[str] = "jacobian"
    weight: float = 0.01
    projections: int = 1

    def __post_init__(self) -> None:
        check_options(self, "regulariser")

    def penalty(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """See `Regulariser.penalty`."""
        images = x.detach().requires_grad_()
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            logits = still(model, images)
            noise = _generator(x_adv)
            total = logits.new_zeros((), dtype=torch.float32)
            for _ in range(self.projections):
                drawn = torch.randn(logits.shape, generator=noise)
                unit = F.normalize(drawn, dim=1).to(logits)
                (row,) = torch.autograd.grad(logits, images, unit, create_graph=True)
                total = total + row.float().square().sum()
        return total * logits.shape[1] / (2 * len(x) * self.projections)


@dataclass(frozen=True, slots=True, kw_only=True)
class Separability(Regulariser):
    """Features of a class close together, clean or attacked, and classes apart; reconstructed.

    After *Adversarial Training with Feature Separability* (arXiv 2205.00637), whose text could not be read: known are a
    graph over clean and attacked images, similarity within classes and separation between them. Ours is the supervised
    contrastive loss (Khosla et al., NeurIPS 2020, eq. 2) over both kinds of images at once, on what the classifier is
    given. Costs two passes.

    Attributes:
        weight: Of the loss; chosen by us.
        temperature: What cosines are divided by; Khosla et al. use 0.1.
    """

    name: ClassVar[str] = "separability"
    weight: float = 0.1
    temperature: float = 0.1

    def __post_init__(self) -> None:
        check_options(self, "regulariser")

    def penalty(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """See `Regulariser.penalty`."""
        classifier = classifier_of(model, x)
        found = torch.cat([features(model, images, classifier) for images in (x, x_adv)])
        return supervised_contrast(found, torch.cat([y, y]), self.temperature)


def supervised_contrast(found: Tensor, y: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss (Khosla et al. 2020, eq. 2) of features [N, D] with labels [N]: a scalar.

    Images that are alone in their class have nobody to be close to, and are left out.
    """
    with torch.autocast(found.device.type, enabled=False):
        unit = F.normalize(found.float(), dim=1)
        itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
        log_p = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    friends = (y[:, None] == y) & ~itself
    count = friends.sum(1)
    mean = log_p.masked_fill(~friends, 0.0).sum(1) / count.clamp_min(1)
    return -mean.sum() / (count > 0).sum().clamp_min(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentBoundary(Regulariser):
    """Cross-entropy on features that are moved towards another class; reconstructed and reduced.

    After *LADDER* (arXiv 2206.03717), which fits a support vector machine with attention to the latent codes, moves
    codes along its normal, and turns them into training images with a generator. Here is **no generator and no
    attention**: between each two classes of the batch lies Fisher's linear boundary (class means, one covariance within
    classes), the features of a clean image move straight towards the nearest of those, and keep their label. The way
    is a constant; network and classifier both learn from it. Costs a pass.

    Attributes:
        weight: Of the loss; chosen by us.
        reach: Share of the way to the boundary, in (0, 1]; features on its other side stay. Chosen by us.
        ridge: What is added to the covariance's diagonal, in units of its mean. Chosen by us.
    """

    name: ClassVar[str] = "boundary"
    weight: float = 0.5
    reach: float = 0.75
    ridge: float = 0.1

    def __post_init__(self) -> None:
        check_options(self, "regulariser")

    def penalty(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """See `Regulariser.penalty`."""

        def shift(found: Tensor) -> Tensor:
            return self.reach * to_boundary(found.detach(), y, ridge=self.ridge)

        return F.cross_entropy(shifted(model, x, classifier_of(model, x), shift).float(), y)


def to_boundary(found: Tensor, y: Tensor, *, ridge: float) -> Tensor:
    """For each of the features [N, D], the shortest way to Fisher's boundary with another class of the batch: [N, D].

    Zero for features beyond that boundary, and where there is one class only.
    """
    with torch.no_grad(), torch.autocast(found.device.type, enabled=False):
        member = F.one_hot(y).to(found)
        member = member[:, member.any(0)]  # the classes of this batch, [N, C]
        mine, classes = member.argmax(1), member.shape[1]
        if classes < 2:
            return torch.zeros_like(found)
        means = member.T @ found / member.sum(0)[:, None]
        inside = found - means[mine]
        covariance = inside.T @ inside / len(found)
        floor = ridge * covariance.diagonal().mean() + _TINY
        eye = torch.eye(len(covariance), dtype=found.dtype, device=found.device)
        axes = torch.linalg.solve(covariance + floor * eye, means.T).T  # [C, D]: a normal is a difference of two
        level = (axes * means).sum(1) / 2
        scores = found @ axes.T - level
        normals = (axes[None] - axes[:, None]).norm(dim=2).clamp_min(_TINY)  # [C, C]
        away = (scores.gather(1, mine[:, None]) - scores) / normals[mine]  # signed distances, [N, C]
        away = away.scatter(1, mine[:, None], torch.inf)
        near, other = away.min(1)
        way = (axes[other] - axes[mine]) / normals[mine, other][:, None]
        moved: Tensor = near.clamp_min(0)[:, None] * way
    return moved


def _generator(images: Tensor) -> torch.Generator:
    """A generator seeded by the bits of images."""
    bits = images.detach().float().contiguous().view(torch.int32).sum(dtype=torch.int64)
    return torch.Generator().manual_seed(int(bits) % 2**62)
