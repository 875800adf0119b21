"""How a run behaves on its machine: one thread, one progress display, output folders that appear whole or not at all.

Knows files and threads. Must not know models, worlds or reports.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging


@contextmanager
def one_thread() -> Iterator[None]:
    """The matrices of this world are so small that a second thread mostly waits; on a busy machine everybody waits.

    It also makes the numbers independent of how many cores there are.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' own progress bars off: ours says more."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def replaced_folder(out: Path, argument: str, mark: str) -> Iterator[Path]:
    """An empty folder beside `out`, which takes its place when the block ends well and vanishes when it does not.

    A folder that is already there is replaced only when it is empty or holds the file `mark`, that is, when it is an
    earlier result; anything else belongs to somebody and is refused.
    """
    out = Path(out).absolute()
    if out.exists():
        if not out.is_dir():
            raise NotADirectoryError(f"{argument}: {out} is a file, wanted a folder")
        if any(out.iterdir()) and not (out / mark).is_file():
            raise FileExistsError(
                f"{argument}: {out} holds other files (and no {mark}), wanted a new folder, an empty one or an earlier "
                "result"
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-")
    except OSError as error:
        raise PermissionError(
            f"{argument}: cannot write to {out.parent} ({error}), wanted a writable folder"
        ) from error
    with scratch as name:
        fresh = Path(name) / "new"
        fresh.mkdir()
        yield fresh
        old = Path(name) / "old"
        if out.exists():
            out.rename(old)
        try:
            fresh.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
