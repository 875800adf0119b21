"""The one setting: how many bytes a call may use beyond its inputs and outputs. A leaf: knows nothing else."""

from __future__ import annotations

_DEFAULT_BYTES = 256 * 2**20
_bytes = _DEFAULT_BYTES


def set_workspace_bytes(num_bytes: int | None) -> int:
    """Set the bytes that a call may use beyond its inputs and outputs, for this process.

    Args:
        num_bytes: at least 1 MiB, or None for the default of 256 MiB.

    Returns:
        The previous setting, so that it can be put back.

    Raises:
        ValueError: `num_bytes` is not an integer of at least 1 MiB.

    Example:
        >>> previous = set_workspace_bytes(64 * 2**20)
        >>> set_workspace_bytes(previous) == 64 * 2**20
        True
    """
    global _bytes
    wanted = _DEFAULT_BYTES if num_bytes is None else num_bytes
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 2**20:
        raise ValueError(
            f"num_bytes: wanted an integer of at least {2**20} (1 MiB) or None, got {num_bytes!r}"
        )
    previous, _bytes = _bytes, wanted
    return previous


def workspace_bytes() -> int:
    return _bytes
