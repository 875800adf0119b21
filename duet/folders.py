"""The folder that a command writes to: one process writes to it at a time, and errors of a full disk name it."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# In what torch says of a write that failed. On a full disk its stream writer, of inline_container.cc, may only say that it is at
# another position than it should be.
_OF_A_WRITE = ("write", "inline_container")


def lock(folder: Path, argument: str) -> int | None:
    """Makes the folder and locks it against every other `lock`, also one of this process, until `unlock`; None: nothing can be locked.

    Raises:
        ValueError: it is locked already.
        OSError: it is a file, or cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{argument}: {folder} is a file, wanted a folder")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        taken = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(taken)
            raise ValueError(
                f"{argument}: another process is writing to {folder}; wanted its end, or another folder"
            ) from None
        except OSError:  # a file system without locks
            os.close(taken)
            return None
        if folder.exists() and os.path.samestat(os.fstat(taken), os.stat(folder)):
            return taken
        os.close(taken)  # who had locked it has removed it, since it was empty


def unlock(taken: int | None) -> None:
    """Lets others lock the folder, also where a process that was forked meanwhile has not ended."""
    if taken is not None and fcntl is not None:
        fcntl.flock(taken, fcntl.LOCK_UN)
        os.close(taken)


@contextmanager
def written(folder: str | os.PathLike, argument: str) -> Iterator[None]:
    """Around a command that writes to `folder`: locked from its beginning to its end. What was made and is empty then is removed."""
    whole = Path(folder).absolute()
    made = [path for path in (whole, *whole.parents) if not path.exists()]
    taken = lock(Path(folder), argument)
    try:
        with disk_named(folder, argument):
            yield
    finally:
        with suppress(OSError):  # the first that is not empty, or is gone
            for path in made:
                path.rmdir()
        unlock(taken)


@contextmanager
def disk_named(folder: str | os.PathLike, argument: str) -> Iterator[None]:
    """Inside, an OSError of a full or broken disk that names no file gets the argument and the folder."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno not in _OF_THE_DISK:
            raise
        raise _not_written(folder, argument, error) from error


@contextmanager
def write_named(folder: str | os.PathLike, argument: str) -> Iterator[None]:
    """The same for all errors of a failed write, those of torch and safetensors too; only a write may be inside."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error).lower() for word in _OF_A_WRITE):
            raise  # torch.save reports a failed write as a RuntimeError; others are not about files
        raise _not_written(folder, argument, error) from error


def _not_written(folder: str | os.PathLike, argument: str, error: Exception) -> OSError:
    return OSError(f"{argument}: {os.fspath(folder)!r} could not be written: {error}")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes all of `data` to `path`, or leaves it as it was: a temporary file, synced and renamed."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        if fcntl is not None:  # Windows opens no folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
