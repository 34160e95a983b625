"""How each torch function moves bounds; what is not here is refused.

A rule is called with the function itself and its arguments, at least one of which is an `Interval` (or holds one). It
must bound every tensor that the function makes of tensors within the bounds, and may leave a `point` only where the
function is linear, or bounded by lines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustcompress.robust.bounds.interval import Affine, Interval, NoRuleError, name_of
from robustcompress.robust.bounds.relu import BoundedReLU

Rule = Callable[..., Any]
RULES: dict[Callable[..., Any], Rule] = {}
"""By function, as `__torch_function__` is given it."""


def _rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    def enter(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return enter


def _no_line(func: Callable[..., Any], x: Interval) -> None:
    if x.point is not None:
        raise NoRuleError(f"crown-ibp has no linear bounds for {name_of(func)}; 'ibp' bounds it")


def _plain(func: Callable[..., Any], *others: Any) -> None:
    """Arguments beside the first that must not be bounds themselves."""
    if any(isinstance(other, Interval) for other in others):
        raise NoRuleError(f"{name_of(func)} has a rule for bounds as its first argument alone")


# What only reads shape, type and place.


@_rule(
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_sparse", "is_quantized", "is_mps", "is_meta")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_contiguous),
    *(Tensor.ndimension, Tensor.nelement, Tensor.element_size, Tensor.__len__, Tensor.is_complex),
    *(Tensor.new_ones, Tensor.new_zeros, Tensor.new_full, Tensor.new_empty),
    *(torch.ones_like, torch.zeros_like, torch.is_floating_point, torch.numel, torch.is_complex),
)
def _shape(func: Rule, x: Interval, *args: Any, **options: Any) -> Any:
    return func(x.value, *args, **options)


# What moves entries about, and what weighs them by numbers that are not negative: linear, and never decreasing.


@_rule(
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.narrow, torch.select),
    *(Tensor.flatten, Tensor.reshape, Tensor.view, Tensor.squeeze, Tensor.unsqueeze, Tensor.narrow, Tensor.select),
    *(Tensor.unflatten, Tensor.view_as, Tensor.reshape_as, Tensor.expand, Tensor.expand_as, Tensor.__getitem__),
    *(Tensor.contiguous, Tensor.detach, Tensor.to, Tensor.float, Tensor.double),
)
def _view(func: Rule, x: Tensor, *args: Any, **options: Any) -> Any:
    _plain(func, *(() if func in (Tensor.view_as, Tensor.reshape_as, Tensor.expand_as) else args))
    args = tuple(other.value if isinstance(other, Interval) else other for other in args)
    if not isinstance(x, Interval):
        return func(x, *args, **options)  # a constant in the shape of bounds
    out = x.map(lambda t: func(t, *args, **options), shared=True)
    if x.point is not None and out.value.shape[:1] != x.value.shape[:1]:
        raise NoRuleError(f"crown-ibp has no rule for {name_of(func)} over the images of a batch")
    x.shared = True
    return out


@_rule(torch.permute, torch.transpose, Tensor.permute, Tensor.transpose, torch.movedim, Tensor.movedim)
def _turn(func: Rule, x: Interval, *args: Any, **options: Any) -> Interval:
    if x.point is not None:
        order = torch.arange(x.value[:1].numel()).view_as(x.value[:1])  # of one image: it must stay the first dimension
        if x.value.dim() == 0 or func(order, *args, **options).shape[0] != 1 or order.shape.count(1) > 1:
            raise NoRuleError(f"crown-ibp has no rule for {name_of(func)} over the images of a batch")
    x.shared = True
    return x.map(lambda t: func(t, *args, **options), shared=True)


@_rule(torch.chunk, torch.split, Tensor.chunk, Tensor.split, torch.unbind, Tensor.unbind)
def _cut(func: Rule, x: Interval, *args: Any, **options: Any) -> tuple[Interval, ...]:
    _no_line(func, x)
    x.shared = True
    parts = zip(*(func(t, *args, **options) for t in (x.value, x.lower, x.upper)), strict=True)
    return tuple(x.with_bounds(value, low, high, None, shared=True) for value, low, high in parts)


@_rule(
    *(torch.mean, Tensor.mean, torch.sum, Tensor.sum, torch.clone, Tensor.clone),
    *(F.avg_pool2d, torch.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool1d),
)
def _weighed(func: Rule, x: Interval, *args: Any, **options: Any) -> Interval:
    out = x.map(lambda t: func(t, *args, **options))
    if x.point is not None and out.value.shape[:1] != x.value.shape[:1]:
        raise NoRuleError(f"crown-ibp has no rule for {name_of(func)} over the images of a batch")
    return out


@_rule(torch.cat, torch.concat, torch.stack)
def _join(func: Rule, tensors: Sequence[Any], dim: int = 0, **options: Any) -> Interval:
    first = next(t for t in tensors if isinstance(t, Interval))
    dim = options.get("axis", dim)
    if first.point is not None and dim in (0, -first.value.dim()):
        raise NoRuleError(f"crown-ibp has no rule for {name_of(func)} over the images of a batch")

    def parts(side: str) -> Any:
        return func([getattr(t, side) if isinstance(t, Interval) else t for t in tensors], dim)

    point = None if first.point is None else parts("point")
    return first.with_bounds(parts("value"), parts("lower"), parts("upper"), point)


@_rule(F.pad)
def _pad(
    func: Rule, input: Interval, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Interval:
    out = input.map(lambda t: func(t, pad, mode, value))  # the numbers put in are the same in all
    _whole_batch(func, input, out.value)
    return out


@_rule(F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout)
def _dropout(func: Rule, input: Interval, p: float = 0.5, training: bool = True, inplace: bool = False) -> Interval:
    if training and p > 0:
        raise NoRuleError("dropout draws for each image, and bounds cannot: train with p=0")
    return input


# Never decreasing, not linear.


_NO_ACTIVATIONS = (F.max_pool2d, torch.max_pool2d, F.adaptive_max_pool2d, torch.amax, Tensor.amax)


def _note(x: Interval) -> None:
    """Leave what an activation is given on the trail."""
    if x.trail is not None:
        x.trail.note(x.lower, x.upper)


@_rule(
    *(F.relu6, F.hardsigmoid, F.softplus, F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh, F.tanh),
    *(F.max_pool2d, torch.max_pool2d, F.adaptive_max_pool2d, F.hardtanh, F.logsigmoid),
    *(torch.amax, Tensor.amax, torch.clamp, Tensor.clamp, torch.clamp_min, Tensor.clamp_min),
)
def _rising(func: Rule, x: Interval, *args: Any, **options: Any) -> Interval:
    _no_line(func, x)
    _plain(func, *args, *options.values())
    if options.get("return_indices"):
        raise NoRuleError(f"{name_of(func)} has no rule for indices")
    if func not in _NO_ACTIVATIONS:
        _note(x)
    return _in_place(x, options, lambda: x.map(lambda t: func(t, *args, **{**options, **_copying(options)})))


@_rule(F.leaky_relu, F.elu, F.celu)
def _rising_if_positive(func: Rule, x: Interval, *args: Any, **options: Any) -> Interval:
    _no_line(func, x)
    strengths = [*args[:1], *(options[key] for key in ("negative_slope", "alpha") if key in options)]
    if any(not isinstance(s, int | float) or s < 0 for s in strengths):
        raise NoRuleError(f"{name_of(func)} has a rule for slopes that are not negative alone")
    _note(x)
    return _in_place(x, options, lambda: x.map(lambda t: func(t, *args, **{**options, **_copying(options)})))


@_rule(F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_)
def _relu(func: Rule, x: Interval, inplace: bool = False) -> Interval:
    _note(x)

    def made() -> Interval:
        point = None
        if x.point is not None:
            if x.slack is None or x.slack.shape[:1] != x.value.shape[:1]:
                raise NoRuleError("crown-ibp has no rule for a ReLU over other things than a batch of images")
            point = BoundedReLU.apply(x.point, x.value, x.lower, x.upper, x.slack)
        return x.with_bounds(x.value.relu(), x.lower.relu(), x.upper.relu(), point)

    return _in_place(x, {"inplace": inplace or func in (torch.relu_, Tensor.relu_)}, made)


VALLEYS: dict[Callable[..., Any], tuple[float, float]] = {
    F.silu: (-1.2784645, -0.2784646),
    F.gelu: (-0.7517915, -0.1699713),
    F.hardswish: (-1.5, -0.375),
    F.mish: (-1.1924312, -0.3088435),
}
"""Functions that fall and then rise: where they turn, and a number below all that they reach."""


@_rule(*VALLEYS)
def _valley(func: Rule, x: Interval, *args: Any, **options: Any) -> Interval:
    _no_line(func, x)
    if args or options.get("approximate", "none") != "none":
        raise NoRuleError(f"{name_of(func)} has no rule with approximate={options.get('approximate', args)!r}")
    turn, least = VALLEYS[func]
    _note(x)

    def made() -> Interval:
        value, low, high = func(x.value), func(x.lower), func(x.upper)
        within = (x.lower <= turn + 1e-3) & (x.upper >= turn - 1e-3)
        lower = torch.where(within, torch.full_like(low, least), torch.minimum(low, high))
        return x.with_bounds(value, torch.minimum(lower, value), torch.maximum(low, high), None)

    return _in_place(x, options, made)


def _copying(options: dict[str, Any]) -> dict[str, Any]:
    return {"inplace": False} if "inplace" in options else {}


def _in_place(x: Interval, options: dict[str, Any], make: Callable[[], Interval]) -> Interval:
    """Give the result, and put it into `x` itself where the function works in place."""
    made = make()
    if not options.get("inplace"):
        return made
    if x.shared:
        raise NoRuleError("there is no rule for changing in place what has views; set inplace=False")
    x.set(made.value, made.lower, made.upper, made.point)
    x.affine = None
    return x


# Linear, with weights of any sign: centre and radius.


def _linear(x: Interval, apply: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor]) -> Interval:
    """Bounds of a linear function.

    Args:
        x: Its input.
        apply: The function.
        spread: The same with the absolute values of its weights, and without a bias.
    """
    value, centre = apply(torch.cat([x.value, x.centre])).chunk(2)
    radius = spread(x.radius)
    return x.with_bounds(value, centre - radius, centre + radius, None if x.point is None else apply(x.point))


@_rule(F.conv1d, F.conv2d)
def _conv(
    func: Rule, input: Interval, weight: Tensor, bias: Tensor | None = None, *args: Any, **options: Any
) -> Interval:
    _plain(func, weight, bias)
    return _linear(
        input,
        lambda t: func(t, weight, bias, *args, **options),
        lambda r: func(r, weight.abs(), None, *args, **options),
    )


@_rule(F.linear)
def _dense(func: Rule, input: Interval, weight: Tensor, bias: Tensor | None = None) -> Interval:
    _plain(func, weight, bias)
    out = _linear(input, lambda t: func(t, weight, bias), lambda r: func(r, weight.abs()))
    if input.value.dim() == 2:
        out.affine = Affine(input.centre, input.radius, weight, bias)
    return out


@_rule(F.batch_norm)
def _batch_norm(
    func: Rule,
    input: Interval,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    """With batch statistics those of the images themselves count, and move the running ones: once, as ever."""
    x = input
    value = func(x.value, running_mean, running_var, weight, bias, training, momentum, eps)
    dims = [0, *range(2, x.value.dim())]
    if training or running_mean is None or running_var is None:
        mean, var = x.value.mean(dims), x.value.var(dims, unbiased=False)
    else:
        mean, var = running_mean, running_var
    scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
    shape = [1, -1, *[1] * (x.value.dim() - 2)]
    scale, mean = scale.view(shape), mean.view(shape)
    shift = 0.0 if bias is None else bias.view(shape)
    centre, radius = (x.centre - mean) * scale + shift, x.radius * scale.abs()
    point = None if x.point is None else (x.point - mean) * scale + shift
    return x.with_bounds(value, centre - radius, centre + radius, point)


# Arithmetic.


def _sides(thing: Any) -> tuple[Any, Any, Any, Any]:
    """Value, lower, upper and point; a number or a tensor is all of them."""
    if isinstance(thing, Interval):
        return thing.value, thing.lower, thing.upper, thing.point
    return thing, thing, thing, thing


def _of(*things: Any) -> Interval:
    return next(thing for thing in things if isinstance(thing, Interval))


def _whole_batch(func: Rule, model: Interval, value: Tensor) -> None:
    if model.point is not None and value.shape[:1] != model.value.shape[:1]:
        raise NoRuleError(f"crown-ibp has no rule for {name_of(func)} over the images of a batch")


def _added(func: Rule, a: Any, b: Any, sign: float = 1.0) -> Interval:
    first = _of(a, b)
    (va, la, ua, pa), (vb, lb, ub, pb) = _sides(a), _sides(b)
    value = va + sign * vb
    _whole_batch(func, first, value)
    low, high = (lb, ub) if sign >= 0 else (ub, lb)
    point = None if first.point is None else pa + sign * pb
    return first.with_bounds(value, la + sign * low, ua + sign * high, point)


@_rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(func: Rule, input: Any, other: Any, *, alpha: float = 1) -> Interval:
    return _added(func, input, other, alpha)


@_rule(torch.sub, Tensor.sub, Tensor.__sub__, torch.subtract, Tensor.subtract)
def _sub(func: Rule, input: Any, other: Any, *, alpha: float = 1) -> Interval:
    return _added(func, input, other, -alpha)


@_rule(Tensor.__rsub__, torch.rsub)
def _rsub(func: Rule, input: Any, other: Any) -> Interval:
    return _added(func, other, input, -1)


@_rule(torch.neg, Tensor.neg, Tensor.__neg__)
def _neg(func: Rule, input: Interval) -> Interval:
    return _added(func, 0.0, input, -1)


@_rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def _mul(func: Rule, input: Any, other: Any) -> Interval:
    first = _of(input, other)
    factor = other if first is input else input
    if isinstance(factor, Interval):
        _no_line(func, first)
        pairs = [a * b for a in (first.lower, first.upper) for b in (factor.lower, factor.upper)]
        value = first.value * factor.value
        return first.with_bounds(
            value, functools.reduce(torch.minimum, pairs), functools.reduce(torch.maximum, pairs), None
        )
    value, centre = first.value * factor, first.centre * factor
    _whole_batch(func, first, value)
    # The derivative of |m| at 0 is taken as 1 here: a closed gate of 0 would otherwise not feel what opening it adds.
    size = torch.where(factor >= 0, factor, -factor) if isinstance(factor, Tensor) else abs(factor)
    radius = first.radius * size
    return first.with_bounds(
        value, centre - radius, centre + radius, None if first.point is None else first.point * factor
    )


@_rule(torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide, Tensor.true_divide)
def _div(func: Rule, input: Any, other: Any) -> Interval:
    if not isinstance(input, Interval) or isinstance(other, Interval):
        raise NoRuleError("there is no rule for dividing by what has bounds")
    centre, radius = input.centre / other, input.radius / abs(other)
    _whole_batch(func, input, centre)
    point = None if input.point is None else input.point / other
    return input.with_bounds(input.value / other, centre - radius, centre + radius, point)


@_rule(Tensor.__iadd__, Tensor.add_)
def _add_here(func: Rule, input: Any, other: Any, *, alpha: float = 1) -> Interval:
    if not isinstance(input, Interval):
        raise NoRuleError("there is no rule for adding bounds to a tensor in place")
    return _in_place(input, {"inplace": True}, lambda: _added(func, input, other, alpha))


@_rule(Tensor.__imul__, Tensor.mul_)
def _mul_here(func: Rule, input: Any, other: Any) -> Interval:
    if not isinstance(input, Interval):
        raise NoRuleError("there is no rule for multiplying a tensor by bounds in place")
    return _in_place(input, {"inplace": True}, lambda: _mul(func, input, other))


@_rule(F.interpolate)
def _enlarged(func: Rule, input: Interval, *args: Any, **options: Any) -> Interval:
    mode = options.get("mode", args[2] if len(args) > 2 else "nearest")
    if mode not in ("nearest", "bilinear", "area", "nearest-exact"):
        raise NoRuleError(f"interpolation by {mode!r} weighs pixels with both signs, and has no rule")
    return input.map(lambda t: func(t, *args, **options))
