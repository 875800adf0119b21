"""How many bytes a call may use beyond its inputs and outputs: by the device's memory, unless set. A leaf: imports torch alone."""

from __future__ import annotations

import functools

import torch

LEAST_BYTES, MOST_BYTES = 256 * 2**20, 3 * 2**30
_set: int | None = None


def set_workspace_bytes(num_bytes: int | None) -> int | None:
    """Set the bytes that a call may use beyond its inputs and outputs, for this process and every device.

    Without a setting it is 256 MiB on a CPU, and on a CUDA device a 64th of its memory, at least 256 MiB and at most
    3 GiB (1.25 GiB of an 80 GB card).

    Args:
        num_bytes: at least 1 MiB, or None for the default of each device.

    Returns:
        The previous setting, so that it can be put back: bytes, or None where nothing was set.

    Raises:
        ValueError: `num_bytes` is not an integer of at least 1 MiB.

    Example:
        >>> previous = set_workspace_bytes(64 * 2**20)
        >>> set_workspace_bytes(previous) == 64 * 2**20
        True
    """
    global _set
    wrong = isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes < 2**20
    if num_bytes is not None and wrong:
        raise ValueError(
            f"num_bytes: wanted an integer of at least {2**20} (1 MiB) or None, got {num_bytes!r}"
        )
    previous, _set = _set, num_bytes
    return previous


def workspace_bytes(device: torch.device | None = None) -> int:
    """The bytes that a call on `device` may use; None stands for a CPU."""
    if _set is not None:
        return _set
    if device is None or device.type != "cuda":
        return LEAST_BYTES
    return share_of(_total_memory(device.index))


def share_of(total_memory: int) -> int:
    """The default on a CUDA device with so many bytes of memory."""
    return min(max(total_memory // 64, LEAST_BYTES), MOST_BYTES)


@functools.lru_cache
def _total_memory(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).total_memory
