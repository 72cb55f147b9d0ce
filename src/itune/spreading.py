"""Work on many pieces by several processes of this machine, its results in the pieces' order."""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from itune import launching

Piece = TypeVar("Piece")
Made = TypeVar("Made")

AHEAD = 2  # chosen: pieces under way for each process, so that none waits and memory stays flat
_work: Callable[[Any], Any] | None = None


def workers(wanted: int | None, *, large: bool) -> int:
    """How many processes to use: as many as wanted, or every core for what is large.

    One where processes cannot be forked safely: what they work on is not copied to them.
    """
    if not sys.platform.startswith("linux"):
        return 1
    return wanted or (len(os.sched_getaffinity(0)) if large else 1)


def in_order(
    work: Callable[[Piece], Made], pieces: Iterable[Piece], count: int
) -> Generator[Made, None, None]:
    """`work(piece)` of each piece, in order, by so many processes.

    What `work` holds is shared with the processes as they are forked; pieces and results are sent.
    An error is raised when its piece's turn comes, so it is the same with any count. Leaving the
    iteration early ends the processes.
    """
    if count == 1:
        yield from map(work, pieces)
        return
    global _work
    _work = work
    pool = concurrent.futures.ProcessPoolExecutor(
        count, multiprocessing.get_context("fork"), initializer=_begin
    )
    waiting: collections.deque[concurrent.futures.Future[Made]] = collections.deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_one, piece))
            if len(waiting) >= AHEAD * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        _work = None
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """A process of the pool: it leaves signals to the one that started it, and ends with it."""
    launching.end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork


def _one(piece: Any) -> Any:
    assert _work is not None
    return _work(piece)
