"""One thread, one progress display, and output folders that are complete or absent."""

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging


@contextmanager
def one_thread() -> Iterator[None]:
    """The matrices of the tiny model are so small that a second thread does not help.

    It also makes the numbers independent of the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Switches off transformers' progress bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def replaced_folder(out: Path, argument: str, names: Collection[str]) -> Iterator[Path]:
    """An empty folder that replaces `out` if the block succeeds, and is removed if it fails.

    An existing `out` is replaced only if it is empty or holds an earlier result: several of `names`, which are all that a result
    has, and nothing else. Any other folder is refused. A symbolic link to it stays one, and a shell that is in it stays there.
    """
    out = Path(out).resolve()
    if out.exists():
        if not out.is_dir():
            raise NotADirectoryError(f"{argument}: {out} is a file, wanted a folder")
        held = {path.name for path in out.iterdir()}
        if held and (len(held) == 1 or not held <= set(names)):
            raise FileExistsError(
                f"{argument}: {out} holds {', '.join(sorted(held - set(names)) or held)}, which is no earlier result; wanted a new folder, "
                "an empty one or an earlier result"
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
        if not out.exists():
            fresh.rename(out)
            return
        old = Path(name) / "old"
        old.mkdir()
        moved = [(path, old / path.name) for path in out.iterdir()]
        moved += [(path, out / path.name) for path in fresh.iterdir()]
        done = []
        try:
            for source, target in moved:
                done.append((source.rename(target), source))
        except BaseException:
            for target, source in reversed(done):
                target.rename(source)
            raise
