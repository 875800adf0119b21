"""A hash of a model's weights, made where the weights are, in one pass over them.

A tensor's bytes are read as 32-bit words w_0 w_1 ... (little-endian, signed; missing bytes at the end count as zeros) in blocks of
B = 65,536 words. Two sums of each block are taken in 64-bit integers, which wrap:

    S_k(block) = sum_i  m_k,i  w_i   mod 2^64          k = 0, 1

The multipliers m are fixed odd numbers, from the bytes of SHAKE-256. The sums of all blocks come to the host at once, and BLAKE2b
hashes them, in order, with names, dtypes and shapes.

* Integers are exact: CPU and GPU agree, and so do all ways to cut the work.
* One changed word always changes its sums: an odd number times a difference below 2^32 is not 0 mod 2^64.
* Two blocks that differ in any other way (in the order of their words, too) have equal sums with a chance of 2^-32 for each k, so
  2^-64 for both: multilinear hashing of 32-bit words modulo 2^64 is strongly universal in its upper half.

Against accidents, not against somebody who builds two models with one hash.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .lm import base_language_model

WEIGHTS_VERSION = "2:"  # what a hash of weights begins with; older ones have no mark
BLOCK = 1 << 16


def weights_hash(model: nn.Module) -> str:
    """A hash of the base model's weights and buffers; adapters are left out, and so are the names that PEFT adds.

    Equal wherever the weights are. The host waits once for a device. Memory beyond the weights: 128 MiB on a GPU, 512 KiB a thread
    on a CPU, where there is a thread for each core.
    """
    named = sorted(_base_tensors(model), key=lambda item: item[0])
    tensors = [tensor for _, tensor in named]
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1) if on_cpu else 1) as pool:
        sums = _on_host(list(pool.map(_block_sums, tensors)))
    digest = hashlib.blake2b(digest_size=16)
    for (name, tensor), each in zip(named, sums, strict=True):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(each.numpy().astype("<i8").tobytes())
    return WEIGHTS_VERSION + digest.hexdigest()


def older_weights(stored: Any, now: Any) -> bool:
    """Whether `now` is a hash of weights, and `stored` one that an older version made in another way."""
    hashes = isinstance(stored, str) and isinstance(now, str)
    return hashes and now.startswith(WEIGHTS_VERSION) and not stored.startswith(WEIGHTS_VERSION)


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the base model under the names that they have without an adapter."""
    adapter = (
        getattr(getattr(model, "base_model", None), "prefix", None) if hasattr(model, "peft_config") else None
    )
    for name, value in base_language_model(model).state_dict().items():
        of_adapter = "modules_to_save." in name or (adapter and adapter in name)
        if isinstance(value, Tensor) and not of_adapter:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), value.detach()


def _block_sums(tensor: Tensor) -> Tensor:
    """`[blocks, 2]` int64, on the tensor's device."""
    words, odd = _words(tensor), _multipliers(str(tensor.device))
    sums = torch.empty(-(-words.numel() // BLOCK), 2, dtype=torch.int64, device=tensor.device)
    (_one_by_one if tensor.device.type == "cpu" else _many_at_once)(words, odd, sums)
    return sums


def _one_by_one(words: Tensor, odd: Tensor, out: Tensor) -> None:
    """For a CPU, whose cache holds a block."""
    wide = torch.empty(BLOCK, dtype=torch.int64)
    for block, here in zip(words.split(BLOCK), out, strict=False):  # no words are one empty block
        torch.mv(odd[:, : len(block)], wide[: len(block)].copy_(block), out=here)


def _many_at_once(words: Tensor, odd: Tensor, out: Tensor, at_once: int = 128) -> None:
    """For a GPU, which has no products of integer matrices."""
    whole = len(words) // BLOCK
    for start in range(0, whole, at_once):
        stop = min(start + at_once, whole)
        wide = words[start * BLOCK : stop * BLOCK].view(-1, BLOCK).to(torch.int64)
        for k in range(2):
            torch.sum(wide * odd[k], 1, out=out[start:stop, k])
    for k in range(2) if whole < len(out) else ():
        rest = words[whole * BLOCK :]
        torch.sum(rest * odd[k, : len(rest)], 0, out=out[whole, k])


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bytes as int32 words, without a copy where that is possible."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    if raw.numel() % 4:
        raw = torch.cat([raw, raw.new_zeros(-raw.numel() % 4)])
    elif raw.storage_offset() % 4:
        raw = raw.clone()
    return raw.view(torch.int32)


@cache
def _multipliers(device: str) -> Tensor:
    """`[2, BLOCK]` odd int64."""
    data = hashlib.shake_256(b"duet-kernels, hash of weights, 2").digest(2 * BLOCK * 8)
    return torch.from_numpy(np.frombuffer(data, "<i8").reshape(2, BLOCK) | 1).to(device)


def _on_host(sums: list[Tensor]) -> list[Tensor]:
    """The same tensors on the CPU, with one copy from each device."""
    arrived: dict[torch.device, Iterator[Tensor]] = {}
    for device in dict.fromkeys(each.device for each in sums):
        here = [each for each in sums if each.device == device]
        arrived[device] = iter(torch.cat(here).cpu().split([len(each) for each in here]))
    return [next(arrived[each.device]) for each in sums]
