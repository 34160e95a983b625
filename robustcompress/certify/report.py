"""What was certified: for every image a class and a radius around it, and the accuracies that they give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robustcompress.durable import write_json
from robustcompress.errors import InputError, ResultError
from robustcompress.robust import wilson
from robustcompress.robust.threat import Norm, ThreatModel

Method = Literal["smoothing", "ibp", "crown-ibp"]
METHODS: tuple[str, ...] = get_args(Method)

ABSTAINS = -1
"""The prediction of a vote that the draws do not decide."""

_FORMAT = 1
_STEPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # radii of the table, in units of sigma


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CertificateReport:
    """What `certify` proved of each image.

    Attributes:
        method: "smoothing" (of the majority vote under noise), "ibp" or "crown-ibp" (of the network itself).
        norm: Of the radii: "l2" for smoothing, "linf" for bounds.
        settings: What it was certified with: sigma, n0, n and alpha; or eps.
        predictions: Class of each image, int64 [n]; -1 where the vote abstains.
        labels: True class of each image, int64 [n].
        radii: Within which radius the prediction is certified, float64 [n], pixel units; 0 where nothing is.
        images_sha256: Hash of the chosen images and labels, in order, as a `RobustReport` has it.
        indices: Which images of the data were chosen, int64 [n].
        seed: Seed of the noise.
        seconds: Wall time, over all runs that it took.
    """

    method: Method
    norm: Norm
    settings: Mapping[str, float]
    predictions: Tensor
    labels: Tensor
    radii: Tensor
    images_sha256: str
    indices: Tensor
    seed: int
    seconds: float

    @property
    def n(self) -> int:
        """How many images were certified, or tried."""
        return self.labels.numel()

    @property
    def correct(self) -> Tensor:
        """Which images are predicted right, certified or not: bool [n]."""
        return self.predictions == self.labels

    @property
    def abstained(self) -> float:
        """Share of the images whose vote is undecided; 0 for bounds, which always predict."""
        return float((self.predictions == ABSTAINS).double().mean())

    def certified(self, radius: float) -> Tensor:
        """Which images are predicted right, and provably so anywhere within `radius`: bool [n].

        Smoothing certifies the open ball, so that its radius has to be larger; bounds the closed one.

        Raises:
            InputError: The radius is negative.
        """
        if not radius >= 0:
            raise InputError(f"radius={radius!r}: give a number, at least 0")
        reaches = self.radii > radius if self.method == "smoothing" else self.radii >= radius
        return self.correct & reaches

    def certified_accuracy(self, radius: float) -> float:
        """Share of `certified(radius)`, in [0, 1]: a lower bound of the accuracy under any attack within it."""
        return int(self.certified(radius).sum()) / self.n

    @property
    def accuracy(self) -> float:
        """Share of the images predicted right, in [0, 1]; an abstention is not right."""
        return int(self.correct.sum()) / self.n

    @property
    def mean_radius(self) -> float:
        """Mean certified radius, where a wrong prediction counts as 0 (the "ACR" of Zhai et al. 2020)."""
        return float((self.radii * self.correct).mean())

    @property
    def table_radii(self) -> tuple[float, ...]:
        """The radii that are shown: multiples of sigma, or 0 and eps."""
        if self.method == "smoothing":
            most = float(self.radii.max())
            return tuple(step * self.settings["sigma"] for step in _STEPS if step * self.settings["sigma"] <= most)
        return (0.0, self.settings["eps"])

    @property
    def name(self) -> str:
        """Method and strength in one word, such as "smoothing-0.25"."""
        strength = self.settings["sigma" if self.method == "smoothing" else "eps"]
        return f"{self.method}-{strength:.4g}"

    def rows(self, radii: Sequence[float] | None = None) -> list[tuple[str, str, str, str]]:
        """Cells of the table: radius, certified accuracy %, its 95 % interval over images, images.

        Args:
            radii: At which; `table_radii` by default.
        """
        found = []
        for radius in self.table_radii if radii is None else radii:
            count = int(self.certified(radius).sum())
            low, high = wilson(count, self.n)
            share = f"{100 * count / self.n:.1f}"
            found.append((f"{radius:.4g}", share, f"{100 * low:.0f} to {100 * high:.0f}", str(self.n)))
        return found

    def notes(self) -> list[str]:
        """What has to be read with the numbers, one sentence each."""
        if self.method == "smoothing":
            said = self.settings
            return [
                f"abstains on {100 * self.abstained:.1f} %, mean certified radius {self.mean_radius:.3g}",
                f"of the majority vote under noise of sigma {said['sigma']:g}, not of a single pass; each image may be "
                f"wrong with probability {said['alpha']:g}; n = {said['n']:,.0f} draws (published figures use 100,000)",
                "certified accuracy is a lower bound for that vote; attacks on the network say nothing about it",
            ]
        return [
            "certified accuracy is a lower bound of the accuracy under any attack; attacks give upper bounds",
            "of the network as computed in double precision; rounding of a deployed file is not covered",
        ]

    def __str__(self) -> str:
        about = f"{self.norm}, {self.n} images, seed {self.seed}"
        columns = ("radius", "certified %", "95 % interval", "n")
        lines = [f"certified by {self.name}: {about}; predicted right: {100 * self.accuracy:.1f} %"]
        rows = [columns, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(lines + self.notes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CertificateReport) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> dict[str, Any]:
        """Return plain data from which `from_json` makes an equal report."""
        return {
            "format": _FORMAT,
            "method": self.method,
            "norm": self.norm,
            "settings": dict(self.settings),
            "n": self.n,
            "accuracy": self.accuracy,
            "abstained": self.abstained,
            "mean_radius": self.mean_radius,
            "certified": [
                {"radius": radius, "accuracy": self.certified_accuracy(radius)} for radius in self.table_radii
            ],
            "predictions": self.predictions.tolist(),
            "labels": self.labels.tolist(),
            "radii": self.radii.tolist(),
            "images_sha256": self.images_sha256,
            "indices": self.indices.tolist(),
            "seed": self.seed,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CertificateReport:
        """Read what `to_json` wrote.

        Raises:
            ResultError: The data are of a newer format, incomplete, or contradict themselves.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise ResultError(f"this is no certificate of format {_FORMAT}: certify again")
        try:
            settings = {str(key): float(value) for key, value in data["settings"].items()}
            report = cls(
                method=data["method"],
                norm=ThreatModel(data["norm"], settings.get("eps", 0.1)).norm,
                settings=settings,
                predictions=torch.tensor(data["predictions"], dtype=torch.int64),
                labels=torch.tensor(data["labels"], dtype=torch.int64),
                radii=torch.tensor(data["radii"], dtype=torch.float64),
                images_sha256=str(data["images_sha256"]),
                indices=torch.tensor(data["indices"], dtype=torch.int64),
                seed=int(data["seed"]),
                seconds=float(data["seconds"]),
            )
            stated = [(float(item["radius"]), float(item["accuracy"])) for item in data["certified"]]
            lists = (report.labels, report.predictions, report.radii, report.indices)
            if any(found.dim() != 1 for found in lists):
                raise ValueError("predictions, labels, radii and indices are lists of numbers")
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise ResultError(f"this is not a certificate: {error!r}") from error
        strengths = {"sigma", "n0", "n", "alpha"} if report.method == "smoothing" else {"eps"}
        lengths = {len(found) for found in lists}
        if report.method not in METHODS or set(settings) != strengths or len(lengths) != 1 or report.n == 0:
            raise ResultError("this certificate is incomplete, or of a method that does not exist: certify again")
        if any(not math.isclose(report.certified_accuracy(radius), share, abs_tol=1e-9) for radius, share in stated):
            raise ResultError("the radii do not give the stated accuracies: the file was changed, certify again")
        return report


def save_certificate(directory: str | Path, report: CertificateReport) -> Path:
    """Write a certificate beside the result that it is about: `certificate.METHOD-STRENGTH.json`, whole or not at all.

    Args:
        directory: Of the saved result.
        report: The certificate; one of the same method and strength is replaced.

    Returns:
        The file.
    """
    path = Path(directory) / f"certificate.{report.name}.json"
    write_json(path, report.to_json())
    return path
