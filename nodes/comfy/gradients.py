"""Gradients through ComfyUI's modules, which are loaded and written for inference.

Weights that a node loaded are inference tensors, blocks add in place, fused kernels and fp8 products have no derivative.
Inside :func:`differentiable` autograd can go through all of them; without a gradient it changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator, Mapping

import comfy.ldm.modules.attention
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ...editloss_core.training.out_of_place import OutOfPlace
from .offers import drop_inference_buffers, fused_kernels, in_training


def thaw(module: nn.Module) -> None:
    """Replace inference tensors among a module's weights by ordinary frozen ones, one at a time, in place.

    Tensors made under ``torch.inference_mode`` cannot be saved for a backward pass. The values stay the same and
    ComfyUI's bookkeeping goes by names, so nothing else notices.
    """
    with torch.inference_mode(False), torch.no_grad():
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None and p.is_inference():
                    part._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=False)
            for name, b in part._buffers.items():
                if b is not None and b.is_inference():
                    part._buffers[name] = b.clone()


class _FrozenProduct(torch.autograd.Function):
    """A linear layer's own forward pass, and grad · W with the weight cast anew in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.layer = layer
        return forward(x.clone())  # ComfyUI's fast fp8 clamps its input in place

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        layer = ctx.layer
        weight, bias, stream = comfy.ops.cast_bias_weight(layer, dtype=grad.dtype, device=grad.device, offloadable=True)
        plain = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        scale = getattr(layer, "scale_weight", None)  # of "scaled fp8" checkpoints
        result = grad @ (plain if scale is None else plain * scale.to(plain))
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        smoothing = getattr(layer, "pre_quant_scale", None)  # that the layer multiplies its input by
        return (result if smoothing is None else result * smoothing.to(result)), None, None


class _FrozenLayer(torch.autograd.Function):
    """Any other layer's forward pass of one tensor, run again for the backward pass: of the layer nothing is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.forward = forward
        ctx.save_for_backward(x)
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(ctx.forward(x), x, grad)[0], None


class _FrozenForward:
    """Takes the place of a layer's ``forward`` where autograd cannot go through it, or would keep a copy of its weight.

    That is a weight in fp8 or quantised (the fast products have no derivative, and the slow ones would hold each weight
    in full precision until the backward pass), one that is patched for each call, and one that waits in another memory and
    is brought in for each call: newer ComfyUI brings all of them into one buffer, where the next layer's weight takes the
    place of what autograd kept.
    """

    def __init__(self, layer: nn.Module):
        self.layer, self.stock = layer, layer.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = self.layer.weight
        plain = (
            weight is None
            or (weight.device == x.device and weight.dtype.itemsize > 1 and not isinstance(weight, QuantizedTensor))
            and not self.layer.weight_function
        )
        if plain or not torch.is_grad_enabled():
            return self.stock(x, *args, **kwargs)
        if isinstance(getattr(self.layer, "in_features", None), int):
            return _FrozenProduct.apply(x, self.layer, self.stock)
        if not x.requires_grad:  # an embedding's numbers of words
            return self.stock(x, *args, **kwargs)
        return _FrozenLayer.apply(x, lambda x: self.stock(x, *args, **kwargs))


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these modules answer with these functions; hooks on them work as ever."""
    before = {part: part.__dict__.get("forward") for part in forwards}
    try:
        for part, forward in forwards.items():
            part.forward = forward
        yield
    finally:
        for part, forward in before.items():
            if forward is not None:
                part.forward = forward
            elif "forward" in part.__dict__:
                del part.forward


@contextlib.contextmanager
def running_differentiably(module: nn.Module) -> Iterator[None]:
    """Inside, autograd can follow a call of ``module``. A block that is computed again needs it as well.

    To look for the layers every time takes 2 ms for all blocks of a Flux together (57 blocks, on a busy CPU core).
    """
    layers = {
        part: _FrozenForward(part)
        for part in module.modules()
        if isinstance(part, comfy.ops.CastWeightBiasOp) and not isinstance(part.forward, _FrozenForward)
    }
    with replaced_forwards(layers), in_training(), OutOfPlace(plain_kernels()):
        yield


@functools.cache
def plain_kernels() -> Mapping[Any, Callable[..., Any]]:
    """Fused kernels of ComfyUI's that have no derivative → the same in plain torch, which has one.

    ComfyUI's own training asks for plain code by a flag (``in_training``); not all of its models look at it.
    """
    found = {}
    for kernel, plain in fused_kernels():
        arguments = kernel.default._schema.arguments
        written = {argument.name for argument in arguments if argument.is_write}
        found[kernel] = _writing(plain, [a.name for a in arguments], written) if written else plain
    return found


def _writing(plain: Callable[..., Any], names: list[str], written: set[str]) -> Callable[..., None]:
    """A kernel that changes some of its inputs, as ``plain`` on copies whose answers are then written over the inputs.

    What ``plain`` keeps for its backward pass stays as it was.
    """

    def kernel(*args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(names, args)), **kwargs}
        answers = plain(**{name: x.clone() if name in written else x for name, x in given.items()})
        inputs = [given[name] for name in names if name in written]
        for x, answer in zip(inputs, answers if isinstance(answers, tuple) else (answers,)):
            x.copy_(answer)

    return kernel


# Of ComfyUI's attention functions those whose kernels have no backward pass: a gradient through them stops, or is without a
# word 0 for queries, keys and values. What is not listed here, the self-check before a run would find.
WITHOUT_BACKWARD = ("attention_sage", "attention3_sage", "attention_flash", "attention_comfy_kitchen_int8")


def attention_with_backward(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """For ``transformer_options["optimized_attention_override"]`` of a pass that is differentiated."""
    if function.__name__ in WITHOUT_BACKWARD and torch.is_grad_enabled():
        return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
    return function(*args, **kwargs)


@contextlib.contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` can be run and differentiated with respect to its input, if gradients are on at all."""
    if not torch.is_inference_mode_enabled():
        drop_inference_buffers()
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        yield
        return
    thaw(module)
    with running_differentiably(module):
        yield


def thaw_attributes(thing: Any) -> None:
    """:func:`thaw` for the tensors of an object that is no module, a latent format for example."""
    with torch.inference_mode(False), torch.no_grad():
        for name, value in vars(thing).items():
            if isinstance(value, Tensor) and value.is_inference():
                setattr(thing, name, value.clone())


def usable(value: Any, device: torch.device) -> Any:
    """A tensor (or those in a list) on ``device``, and fit for autograd although it was made in inference mode."""
    if isinstance(value, (list, tuple)):
        return [usable(v, device) for v in value]
    if not isinstance(value, Tensor):
        return value
    value = value.to(device)
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value


def checkpoint_units(root: nn.Module) -> list[nn.Module]:
    """The blocks of a network: the highest modules below it that are called as a whole and consist of parts."""
    units = []
    for part in root.children():
        container = isinstance(part, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        if container or type(part).forward is nn.Module.forward:
            units += checkpoint_units(part)
        elif next(part.children(), None) is not None:
            units.append(part)
    return units


@contextlib.contextmanager
def checkpointed(root: nn.Module) -> Iterator[None]:
    """Inside, each block of ``root`` keeps its inputs only and is computed again in the backward pass."""
    with replaced_forwards({unit: _recomputed(unit) for unit in checkpoint_units(root)}):
        yield


def _recomputed(unit: nn.Module) -> Callable[..., Any]:
    stock = unit.forward

    def run(*args, **kwargs):
        with running_differentiably(unit):  # the backward pass comes when the one around the network has ended
            return stock(*args, **kwargs)

    def forward(*args, **kwargs):
        options = kwargs.get("transformer_options")
        if isinstance(options, dict):  # the network writes each block's number into one dictionary
            kwargs["transformer_options"] = options.copy()
        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    return forward
