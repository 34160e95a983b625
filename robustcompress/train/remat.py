"""Activation checkpointing: blocks keep their input alone, and are computed again on the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find what is worth computing again as a whole: the outermost items of sequences that are made of several layers.

    These are the residual blocks of residual networks, the layers of transformers, the stages of others. Where a model
    has no such sequence, its own parts of several layers are taken.

    Returns:
        Names and modules, none inside another; empty where the model is one flat list of layers.
    """
    sequences = (nn.Sequential, nn.ModuleList)

    def composite(module: nn.Module) -> bool:
        return any(True for _ in module.children()) and any(True for _ in module.parameters())

    def search(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(module, sequences) and composite(child) and not isinstance(child, sequences):
                yield path, child
            else:
                yield from search(child, f"{path}.")

    found = list(search(model, ""))
    return found or [(name, child) for name, child in model.named_children() if composite(child)]


@contextmanager
def rematerialised(model: nn.Module) -> Iterator[int]:
    """Within it, blocks of the model do not keep their activations for the backward pass, but compute them again.

    Memory falls to one input a block and the activations of one block; each backward pass costs one more forward pass,
    in attacks as in training. Numbers stay the same: random numbers (dropout) are drawn anew from the same state, and
    running statistics of batch norms move only the first time. Blocks are looked for each time, so that edits between
    two steps are seen; hooks on a block fire once, and hooks inside a block fire again when it is computed again.
    Nothing stays behind on the model.

    Yields:
        How many blocks it covers; 0 where the model has none.
    """
    blocks = [module for _, module in blocks_of(model)]
    kept = [(block, block.__dict__.get("forward")) for block in blocks]
    for block in blocks:
        block.forward = _again(block, block.forward)
    try:
        yield len(blocks)
    finally:
        for block, own in kept:
            if own is None:
                del block.forward
            else:
                block.forward = own


def _again(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: _contexts(block), **kwargs)

    return run


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For the pass forward nothing; for the one on the way back the modes of now, and buffers that stay as they are."""
    modes = [(module, module.training) for module in block.modules()]
    return nullcontext(), _SecondTime(modes)


class _SecondTime:
    """`_second_time`, for as many ways back as there are: a graph that is kept may be gone through again."""

    def __init__(self, modes: list[tuple[nn.Module, bool]]) -> None:
        self._modes = modes
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(_second_time(self._modes))
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


@contextmanager
def _second_time(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    now = [(module, module.training) for module, _ in modes]
    # In train mode, whatever a layer notes about the batch goes to copies: it noted the same the first time. (Telling
    # batch norms not to track would do too, were it not that they then keep fewer tensors than in the first pass.)
    kept = [(module, dict(module._buffers)) for module, mode in modes if mode and module._buffers]
    for module, mode in modes:
        module.training = mode
    for module, buffers in kept:
        module._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
        for module, mode in now:
            module.training = mode
