"""Changes of the weights, undone afterwards: rounding, fine-tuning, adapters merged.

    q = clamp(round(w / s), -(2^(bits-1) - 1), 2^(bits-1) - 1),   s = max|w_row| / (2^(bits-1) - 1),   w' = s q

Everything happens in place, inside `restored(model)`: one copy of the weights on the host, none on the GPU.
"""

import importlib.util
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from duet_kernels import linear_cross_entropy

from ...model.adapters import adapter_layers, check_same_logits, logits_of, merged_in_place
from ...model.lm import base_language_model
from ...model.switches import evaluating
from ..scoring import Forced, forced_hidden


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Weights, dtypes and flags may change inside, where dropout is off at first; afterwards the model is bitwise what it was."""
    tensors = [*model.parameters(), *model.buffers()]
    saved = [(t, t.data.device, t.data.to("cpu", copy=True), t.requires_grad) for t in tensors]
    try:
        with evaluating(model):
            yield
    finally:
        for tensor, device, data, requires_grad in saved:
            tensor.data = data.to(device)
            tensor.grad = None
            if tensor.is_floating_point():
                tensor.requires_grad_(requires_grad)


# --- quantisation ----------------------------------------------------------------------------------------------


def quantize(weight: Tensor, bits: int) -> Tensor:
    """Round to nearest on a symmetric grid, one scale per output channel (row), and back to floating point.

    Args:
        weight: `[..., out, in]`; a row of zeros stays zero.
        bits: 2 to 8.

    Example:
        >>> quantize(torch.tensor([[0.9, -7.0, 3.4]]), bits=4)
        tensor([[ 1., -7.,  3.]])
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: got {bits}, wanted 2 to 8")
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=-1, keepdim=True) / top
    steps = torch.where(scale > 0, weight / scale, torch.zeros_like(weight))
    return steps.round().clamp(-top, top) * scale


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> None:
    """Every matrix of the model, embeddings and head too, rounded to `bits` (a tied head once)."""
    views = {m.weight: _by_output(m) for m in model.modules() if isinstance(m, Conv1D)}
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter.is_floating_point():
            weight = views.get(parameter, parameter.data)
            weight.copy_(quantize(weight.float(), bits))


def _by_output(layer: nn.Linear | Conv1D) -> Tensor:
    """A linear layer's weight as `[out, in]`, a view; GPT-2's layers hold it the other way round."""
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


def nf4_missing() -> str | None:
    """Why NF4 cannot run here; None when it can."""
    return None if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"


@torch.no_grad()
def nf4_weights(model: Any) -> None:
    """As QLoRA loads a model: the linear layers in NF4 (64 weights per scale), embeddings and LM head unchanged."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    head = model.get_output_embeddings()
    for module in model.modules():
        if (
            isinstance(module, (nn.Linear, Conv1D))
            and module is not head
            and module.weight.is_floating_point()
        ):
            weight = _by_output(module)
            packed, state = quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
            weight.copy_(dequantize_4bit(packed, state))


# --- adapters --------------------------------------------------------------------------------------------------


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """The adapter, if there is one, added to the weights and rounded to their dtype; then `restored`.

    Raises:
        ValueError: the merged model is another one than the model with its adapter. Quantised bases are not compared: there
            the rounding is what the attack is about.
    """
    if not adapter_layers(model):
        with restored(model):
            yield
        return
    wanted = logits_of(model)
    with restored(model), merged_in_place(model):
        if getattr(base_language_model(model), "hf_quantizer", None) is None:
            check_same_logits(model, wanted, "model: merging its adapter")
        yield


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Inside, layers whose weights are packed in 4 or 8 bits (bitsandbytes) are plain linear layers, with their LoRA or DoRA added.

    Adding a LoRA to packed weights rounds them again to the same grid, and what is packed is no floating-point matrix that
    `round_weights` would see. Unpacked weights are in the dtype of the model's other weights. Models without such layers are left alone.
    DoRA's rows have the lengths that it learnt: m (W + B A) / |W + B A|.
    """
    swapped: list[tuple[Any, str, nn.Module]] = []
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name, module in list(model.named_modules()):
        inner = getattr(module, "base_layer", module)
        packed = type(inner).__name__ in ("Linear4bit", "Linear8bitLt") and not hasattr(inner, "base_layer")
        if name.endswith(".base_layer") or not packed:
            continue
        parent, _, child = name.rpartition(".")
        swapped.append((model.get_submodule(parent), child, module))
    try:
        for parent, child, module in swapped:
            setattr(parent, child, _plain(module, dtype))
        yield
    finally:
        for parent, child, module in swapped:
            setattr(parent, child, module)


@torch.no_grad()
def _plain(module: Any, dtype: torch.dtype) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    inner = getattr(module, "base_layer", module)
    packed: Any = inner.weight
    if type(inner).__name__ == "Linear4bit":
        weight = dequantize_4bit(packed.data, packed.quant_state).float()
    else:  # the first forward moves the scales of the rows from the weight into the layer's state
        scales = packed.SCB if getattr(packed, "SCB", None) is not None else inner.state.SCB
        weight = int8_vectorwise_dequant(packed.data, scales).float()
    for adapter in getattr(module, "active_adapters", ()) if module is not inner else ():
        if adapter in module.lora_A:
            weight = weight + module.get_delta_weight(adapter).float()
        if getattr(module, "use_dora", {}).get(adapter):
            wanted: Tensor = module.lora_magnitude_vector[adapter].weight.float()
            weight = weight * (wanted / weight.norm(dim=1))[:, None]
    layer = nn.Linear(inner.in_features, inner.out_features, bias=inner.bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if inner.bias is not None:
        layer.bias = nn.Parameter(inner.bias.detach().to(dtype), requires_grad=False)
    return layer


# --- fine-tuning -----------------------------------------------------------------------------------------------


def fine_tune(
    model: nn.Module,
    sequences: Sequence[Forced],
    *,
    rate: float,
    curve: Sequence[int],
    rows: int,
    pad_id: int,
    seed: int = 0,
) -> Iterator[tuple[int, float]]:
    """AdamW (no weight decay) on the cross-entropy of the answers; every weight that can be trained is.

    Half-precision weights are trained in fp32: otherwise small steps would round to 0, and the attack would look weak.
    Dropout draws from `seed`, whatever was drawn before or between the steps, and leaves torch's random numbers as they were. Use
    inside `restored(model)`.

    Args:
        rate: learning rate, constant.
        curve: after which numbers of steps to yield, ascending.
        rows: sequences a step, drawn anew.
        seed: which sequences, and what dropout drops.

    Yields:
        (steps done, loss of the last one in nats); after a loss that is not finite nothing more.
    """
    trained = [p for p in model.parameters() if p.is_floating_point()]
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    gpus = range(torch.cuda.device_count())  # the seed is that of all of them
    rng, dropout = random.Random(seed), random.Random(f"dropout {seed}")
    for step in range(1, max(curve) + 1):
        model.train()
        batch = rng.sample(sequences, min(rows, len(sequences)))
        optimizer.zero_grad()
        with torch.random.fork_rng(gpus):
            torch.manual_seed(dropout.getrandbits(63))
            loss = linear_cross_entropy(*forced_hidden(model, batch, pad_id))
            loss.backward()
        optimizer.step()
        if step in curve:
            value = float(loss.detach())
            if not math.isfinite(value):
                return
            model.eval()
            yield step, value


ROUNDINGS: dict[str, Callable[[nn.Module], None]] = {
    "int8": lambda model: round_weights(model, 8),
    "int4": lambda model: round_weights(model, 4),
    "nf4": nf4_weights,
}
