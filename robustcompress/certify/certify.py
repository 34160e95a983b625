"""certify(): prove of each image how far it may be changed before the answer can."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from robustcompress.certify.ledger import Ledger
from robustcompress.certify.report import METHODS, CertificateReport, Method
from robustcompress.certify.smoothing import Smoothed
from robustcompress.data import DataSplits, Images
from robustcompress.errors import InputError, Problems, nearest
from robustcompress.interrupt import stop_if_asked
from robustcompress.result import CompressResult
from robustcompress.robust import EvaluationProgress, ThreatModel
from robustcompress.robust.bounds import certified_by_bounds
from robustcompress.robust.chunks import model_sha256
from robustcompress.robust.evaluate import chosen_images
from robustcompress.robust.judge import Progress, as_float, hash_of
from robustcompress.robust.sanity import check_images, check_model
from robustcompress.train import resolve_device

_BOUNDED = 32  # images that bounds are computed for at a time


def certify(
    model: nn.Module | CompressResult,
    data: DataSplits | Images | tuple[Tensor, Tensor],
    *,
    method: str = "smoothing",
    sigma: float = 0.25,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    eps: float | None = None,
    batch_size: int = 1000,
    max_images: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    resume_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> CertificateReport:
    """Prove of each image that no change within some radius alters the answer, whatever attack makes it.

    "smoothing" is about the network's majority vote under Gaussian noise (Cohen et al. 2019), and gives an l2 radius to
    any network; it is worth something where the network was trained under such noise (objective "smoothing"). "ibp"
    (interval bounds, Gowal et al. 2018) and "crown-ibp" (Zhang et al. 2020: one linear bound more, backwards from the
    logits) are about the network itself under linf; they prove next to nothing unless it was trained for such bounds.

    Attacks give upper bounds of what a network withstands, certificates lower bounds. The images are those that
    `evaluate` takes, in its order, so that the two can be compared image by image.

    Args:
        model: Maps images in [0, 1] to logits [N, K]; or a result. It is copied, and judged in eval mode.
        data: Splits, of which the test images are taken; `Images`; or a pair of images [N, 3, H, W] and labels [N].
        method: "smoothing", "ibp" or "crown-ibp".
        sigma: For smoothing: standard deviation of the noise, in the unit of the pixels.
        n0: For smoothing: draws that guess the class.
        n: For smoothing: draws that bound its probability. Published figures use 100,000, which certify larger radii.
        alpha: For smoothing: probability with which the certificate of an image may be wrong.
        eps: For bounds: linf radius; None for that of a result's threat.
        batch_size: For smoothing: draws a forward pass. The draws depend on it.
        max_images: Certify so many images only; None for all.
        seed: Of the noise. The draws also depend on the kind of device.
        device: "auto" (CUDA where available), or a device.
        resume_dir: Where each image's result is kept; a second run with the same model, images and settings takes it
            from there.
        progress: Called after each image (bounds: each batch), with the certified accuracy so far.

    Returns:
        Class and certified radius of each image.

    Raises:
        InputError: Anything about the model, the images or the settings cannot work; all of it is listed, before any
            long work. Or there is no rule for a layer of the network (bounds); it is named.
    """
    problems = Problems("certify() cannot start")
    pixels, labels = _images(data)
    network, result = (model.model, model) if isinstance(model, CompressResult) else (model, None)
    target = problems.attempt(lambda: resolve_device(device))
    if eps is None and method != "smoothing" and result is not None and result.threat.norm == "linf":
        eps = result.threat.eps
    settings = checked_settings(problems, method, sigma=sigma, n0=n0, n=n, alpha=alpha, eps=eps)
    for key, count in (("batch_size", batch_size), ("max_images", max_images)):
        if count is not None and not _whole(count):
            problems.add(f"{key}={count!r}: give a whole number, at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int):
        problems.add(f"seed={seed!r}: give a whole number")
    check_images(pixels, labels, ThreatModel(), problems)
    if problems.items or target is None:
        problems.raise_if_any()
    network = copy.deepcopy(network).to(target).eval().requires_grad_(False)
    check_model(network, as_float(pixels[:2], target), labels, problems)
    problems.raise_if_any()

    indices = chosen_images(len(pixels), max_images)
    pixels, labels = pixels[indices.to(pixels.device)], labels[indices.to(labels.device)].long().cpu()
    sha = hash_of(pixels, labels)
    facts = {"method": method, **settings, "images": sha, "seed": seed, "batch_size": batch_size, "device": target.type}
    troubles: list[str] = []
    ledger = Ledger(
        None if resume_dir is None else Path(resume_dir),
        {**facts, "model": model_sha256(network) if resume_dir is not None else None},
        troubles.append,
    )
    if method == "smoothing":
        draws = {"n0": int(settings["n0"]), "n": int(settings["n"])}
        judge = _by_votes(
            Smoothed(
                model=network,
                sigma=sigma,
                alpha=alpha,
                batch_size=batch_size,
                device=cast(torch.device, target),
                seed=seed,
                **draws,
            ),
            pixels,
            indices,
        )
    else:
        judge = _by_bounds(network.double(), pixels, cast(torch.device, target), settings["eps"], method == "crown-ibp")
    began = time.perf_counter()
    found: list[tuple[int, float, float]] = []
    right = 0
    while len(found) < len(labels):
        at = len(found)
        kept = ledger.get(at)
        if kept is None:
            stop_if_asked(f"stopped after {at} of {len(labels)} images{ledger.kept}")
            with _undisturbed():
                for offset, entry in enumerate(judge(at)):
                    if ledger.get(at + offset) is None:
                        ledger.put(at + offset, *entry)
            kept = ledger.get(at)
            assert kept is not None
        found.append(kept)
        right += kept[0] == int(labels[at]) and kept[1] > 0
        if progress is not None:
            said = {"attack": method, "done": len(found), "total": len(labels), "accuracy": right / len(found)}
            progress(EvaluationProgress(**said, seconds=time.perf_counter() - began))  # type: ignore[arg-type]
    for trouble in troubles:
        warnings.warn(trouble, RuntimeWarning, stacklevel=2)
    return CertificateReport(
        method=cast(Method, method),
        norm="l2" if method == "smoothing" else "linf",
        settings=settings,
        predictions=torch.tensor([prediction for prediction, _, _ in found]),
        labels=labels,
        radii=torch.tensor([radius for _, radius, _ in found], dtype=torch.float64),
        images_sha256=sha,
        indices=indices,
        seed=seed,
        seconds=sum(seconds for _, _, seconds in found),
    )


def _by_votes(smoothed: Smoothed, pixels: Tensor, indices: Tensor) -> Any:
    """Certifies the image at a place: a list of one prediction, radius and time."""

    def judge(at: int) -> list[tuple[int, float, float]]:
        began = time.perf_counter()
        # By the image's number in the data: it gets the same noise however many are certified.
        prediction, radius = smoothed.certify(as_float(pixels[at], smoothed.device), int(indices[at]))
        return [(prediction, radius, time.perf_counter() - began)]

    return judge


def _by_bounds(network: nn.Module, pixels: Tensor, device: torch.device, eps: float, crown: bool) -> Any:
    """Certifies the images from a place on, a batch of them."""

    def judge(at: int) -> list[tuple[int, float, float]]:
        began = time.perf_counter()
        x = as_float(pixels[at : at + _BOUNDED], device).double()
        predictions, proven = certified_by_bounds(network, x, eps, crown=crown)
        each = (time.perf_counter() - began) / len(x)
        pairs = zip(predictions.tolist(), proven.tolist(), strict=True)
        return [(prediction, eps if holds else 0.0, each) for prediction, holds in pairs]

    return judge


def checked_settings(
    problems: Problems,
    method: str,
    *,
    sigma: float = 0.25,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    eps: float | None = None,
) -> dict[str, float]:
    """Check what a method needs, note what is wrong with it, and return it; see `certify` for the arguments."""
    if method not in METHODS:
        problems.add(f"method={method!r} is unknown{nearest(str(method), METHODS)}")
        return {}
    if method != "smoothing":
        if eps is None:
            problems.add(f"method {method!r} needs eps, an linf radius such as 8/255")
            return {}
        threat = problems.attempt(lambda: ThreatModel("linf", eps))
        return {} if threat is None else {"eps": threat.eps}
    if eps is not None:
        problems.add(f"eps={eps!r}: smoothing finds the radii itself; leave eps out")
    if not _number(sigma) or not sigma > 0:
        problems.add(f"sigma={sigma!r}: must be a positive number, such as 0.25")
    if not _number(alpha) or not 0 < alpha < 1:
        problems.add(f"alpha={alpha!r}: must lie in (0, 1), such as 0.001")
    for key, count in (("n0", n0), ("n", n)):
        if not _whole(count):
            problems.add(f"{key}={count!r}: give a whole number, at least 1")
    if _whole(n) and _number(alpha) and 0 < alpha < 1 and alpha ** (1 / n) <= 0.5:
        least = math.floor(math.log(alpha) / math.log(0.5)) + 1
        problems.add(f"n={n}: so few draws cannot show a majority with alpha={alpha:g}; give at least {least}")
    return {"sigma": sigma, "n0": n0, "n": n, "alpha": alpha}


def _images(data: object) -> tuple[Tensor, Tensor]:
    if isinstance(data, DataSplits):
        data = data.test
    pair = data if isinstance(data, tuple) else (getattr(data, "pixels", None), getattr(data, "labels", None))
    if len(pair) == 2 and isinstance(pair[0], Tensor) and isinstance(pair[1], Tensor):
        return pair[0], pair[1]
    raise InputError(
        f"certify() cannot start: data is {type(data).__name__}: give what load_data() returns, Images, or a pair of "
        "tensors, images [N, 3, H, W] and labels [N]"
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What a network draws from torch's own generators must not move those of the caller."""
    with torch.inference_mode(False), torch.random.fork_rng():
        yield


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
