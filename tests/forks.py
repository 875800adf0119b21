"""Processes that import nothing: children of the test's own, which has imported everything."""

import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable

from tqdm import tqdm

SECONDS = 240  # a child that takes longer is ended


def forked(work: Callable[[], object], seconds: int = SECONDS) -> int:
    """The id of a child that does `work()` and ends, in silence but for an error; after so many seconds at the latest."""
    child = os.fork()
    if child:
        return child
    try:
        # A child shares the lock of progress bars with its parent. Were it killed while it holds the lock, all others would wait
        # forever: it gets a lock of its own.
        tqdm.set_lock(threading.RLock())
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends it even where it waits in C
        signal.alarm(seconds)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended_by(child: int) -> int:
    """The status of a child that has ended, as `os.waitpid` gives it: 0, the signal, or 256 times the exit status."""
    return os.waitpid(child, 0)[1]


def run_ranks(ranks: int, work: Callable[[], object]) -> None:
    """`work()` in so many processes, which a launcher's environment makes ranks of one group; all must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def one(rank: int) -> None:
        from accelerate.state import AcceleratorState, GradientState

        os.environ |= {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        AcceleratorState._reset_state(reset_partial_state=True)  # the parent's: one process
        GradientState._reset_state()
        work()

    children = [forked(lambda rank=rank: one(rank)) for rank in range(ranks)]
    assert [ended_by(child) for child in children] == [0] * ranks, "their errors are in the captured stderr"
