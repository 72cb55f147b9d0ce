"""Micro-batches made ahead of the step that needs them, by a thread of their own.

Needs torch. Nothing here draws random numbers: what is trained on is the plan's business.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from itune import batches, plans

if TYPE_CHECKING:
    from itune import data

AHEAD = 8  # micro-batches that wait at most. chosen: some kilobytes each, and a step never stalls


class Feed:
    """One rank's micro-batches of the plan from a step on, in order, on the device.

    `with Feed(...) as feed:` then for each step `feed.batches(count)`. `waited` is how many
    seconds the step had to wait for them so far. What fails in the thread is raised by `batches`.
    """

    def __init__(
        self,
        plan: plans.Plan,
        corpus: data.Corpus,
        collate: batches.Collate,
        *,
        rank: int,
        start: int,
        device: torch.device,
    ) -> None:
        self.plan, self.corpus, self.collate = plan, corpus, collate
        self.rank, self.start, self.device = rank, start, device
        self.waited = 0.0
        self._reset()

    def _reset(self) -> None:
        self._ready: queue.Queue[Any] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="itune-feed", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def restart(self, plan: plans.Plan, start: int) -> None:
        """Begin again at a step, by another plan: what was made ahead is dropped."""
        self._close()
        self.plan, self.start = plan, start
        self._reset()
        self._thread.start()

    def _close(self) -> None:
        self._closed.set()
        while self._thread.is_alive():  # a thread that waits for room gets it
            with contextlib.suppress(queue.Empty):
                self._ready.get_nowait()
            self._thread.join(0.01)

    def step(self) -> plans.Step:
        """The next step of the plan; its micro-batches follow."""
        step: plans.Step = self._next()
        return step

    def batches(self, count: int) -> Iterator[tuple[np.ndarray, batches.Batch]]:
        """(rows, batch) of the next `count` micro-batches, on the device."""
        for _ in range(count):
            rows, batch = self._next()
            yield rows, batch.to(self.device)

    @functools.cached_property
    def idle(self) -> Any:
        """A batch of the shortest example: what a process computes to no effect while others,
        which need its part of a cut model, have micro-batches left.
        """
        shortest = np.array([self.corpus.lengths.argmin()])
        return self.collate(self.corpus, shortest).to(self.device)

    def _next(self) -> Any:
        started = time.perf_counter()
        item = self._ready.get()
        self.waited += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        try:
            for item in self._items():
                self._put(item)
                if self._closed.is_set():
                    return
        except BaseException as error:  # raised where it is waited for, not lost in a thread
            self._put(error)

    def _items(self) -> Iterator[Any]:
        for number in range(self.start, len(self.plan)):
            step = self.plan.step(number)
            yield step
            for rows in step.ranks[self.rank]:
                batch = self.collate(self.corpus, rows)
                yield rows, batch.pinned() if self.device.type == "cuda" else batch

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return
