"""Many answers a token at a time: a row that ends gives its slot to the next that waits.

Needs torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from itune import memory, picking, signals, slots

BATCH_ROWS = 64
# chosen: a GPU waits for its next kernel at so few rows; the room of the cache sets the bound.
TIMES_ON_GPU = 4
# chosen: the cache may take so much, and on a GPU this share of what is free.
CACHE_BYTES = 1 << 30
CACHE_SHARE = 0.4
# chosen: room for so many tokens of an answer is taken at first, and more when one gets there.
AHEAD = 64
# chosen: waiting rows are read when so large a share of the slots is free; one by one, reading
# them would cost a call of the model each.
FREE = 0.25
READ_TOKENS = 8192  # chosen: activations of so many tokens stay small beside the weights

Told = Callable[[int, int], None]
Ended = Callable[[int, list[int], bool], None]


@dataclass
class Row:
    """A prompt and its answer so far.

    ids: both together, `begin` where the answer begins; most: tokens it may have.
    """

    place: int
    ids: list[int]
    begin: int
    most: int
    draws: np.random.Generator

    @property
    def new(self) -> int:
        """How many tokens the answer has."""
        return len(self.ids) - self.begin


def shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at least one of each is left over."""
    if len(prompts) < 2:
        return 0
    lists = [list(each) for each in prompts]
    low, high = min(lists), max(lists)
    most = min(len(low), len(high), *(len(each) for each in prompts)) - 1
    return next((k for k in range(most) if low[k] != high[k]), most)


def room(model: Any) -> int:
    """How many tokens the cache may hold at once, over all rows."""
    limit = CACHE_BYTES
    if model.device.type == "cuda":
        limit = int((memory.left(model.device) or 0) * CACHE_SHARE)
    return max(1, limit // slots.bytes_per_token(model))


class Stepper:
    """Answers rows by a model. `told(place, token)` hears of each token, `ended(place, ids,
    stopped)` of each answer, its stop token among the ids where it `stopped`."""

    def __init__(self, model: Any, fields: Mapping[str, Any], told: Told, ended: Ended) -> None:
        self.model, self.told, self.ended = model, told, ended
        self.picker = picking.Picker(fields, model.device)
        self.stops = set(fields["eos_token_id"])
        self.active: list[Row] = []
        self.waiting: deque[Row] = deque()
        self.slots = slots.Slots.of(model, 0, 0)
        self.n_rows = self.columns = self.prefix = 0
        self.tokens = room(model)

    def run(self, rows: Sequence[Row], prefix: Sequence[int]) -> None:
        """Answer rows, begun in their order; all prompts begin with `prefix`."""
        self.waiting.extend(rows)
        self._resize(max(len(prefix), self._longest(waiting=BATCH_ROWS)))
        if prefix:
            ids = torch.tensor([list(prefix)], device=self.model.device)
            self.slots.read(ids, first=0, start=0)
            self.slots.keep(len(prefix))
            self.prefix = len(prefix)
        while self.waiting or self.active:
            signals.LISTENER.check()
            self._admit()
            self._step()

    # --- sizes -----------------------------------------------------------------------------

    def _longest(self, *, waiting: int = 0) -> int:
        """Tokens of the longest row under way, or among the next that wait."""
        some = [self.waiting[k] for k in range(min(waiting, len(self.waiting)))]
        return max(len(row.ids) for row in (*self.active, *some))

    def _sizes(self, longest: int) -> tuple[int, int]:
        """(slots, columns) for rows of so many tokens, and some more of their answers."""
        known = (*self.active, *self.waiting)
        ahead = min(AHEAD, max((row.most - row.new for row in known), default=0))
        columns = longest + max(1, ahead)
        most = BATCH_ROWS * (TIMES_ON_GPU if self.model.device.type == "cuda" else 1)
        return min(most, len(known), max(1, self.tokens // columns)), columns

    def _resize(self, longest: int) -> None:
        """Take room for rows of so many tokens; those that find none go back to wait."""
        self.n_rows, self.columns = self._sizes(longest)
        while len(self.active) > self.n_rows:
            self.waiting.appendleft(self.active.pop())
        self.slots.resize(self.n_rows, self.columns, len(self.active))

    # --- rows ------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Read waiting rows into the free slots, where enough are free."""
        if not self.waiting:
            return
        longest = self._longest(waiting=self.n_rows - len(self.active))
        if longest >= self.columns or self._sizes(longest)[0] >= 2 * self.n_rows:
            self._resize(longest)
        free = self.n_rows - len(self.active)
        if self.active and free < FREE * self.n_rows:
            return
        some = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        some.sort(key=lambda row: -len(row.ids))
        while some:
            size = max(1, READ_TOKENS // len(some[0].ids))
            self._read(some[:size])
            some = some[size:]

    def _read(self, rows: list[Row]) -> None:
        """All tokens of new rows but the last of each, which is the first to be stepped from."""
        first = len(self.active)
        self.active += rows
        if self.prefix:
            self.slots.put(first, len(rows))
        width = max(len(row.ids) for row in rows) - 1 - self.prefix
        if width < 1:
            return
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        for k, row in enumerate(rows):
            part = row.ids[self.prefix : -1]
            ids[k, : len(part)] = torch.tensor(part, dtype=torch.long)
        self.slots.read(ids.to(self.model.device), first=first, start=self.prefix)

    def _step(self) -> None:
        """One token more for each row under way."""
        longest = self._longest()
        if longest > self.columns:
            self._resize(longest)
        rows = self.active
        now = torch.tensor([[row.ids[-1], len(row.ids) - 1] for row in rows])
        ids, positions = now.to(self.model.device).unbind(1)
        logits = self.slots.step(ids, positions, longest)
        texts = [row.ids for row in rows] if self.picker.needs_text else []
        scores = self.picker.scores(logits, texts, [row.new for row in rows])
        ended = []
        picked = self.picker.pick(scores, [row.draws for row in rows])
        for k, (row, token) in enumerate(zip(rows, picked, strict=True)):
            row.ids.append(token)
            if token in self.stops or row.new >= row.most:
                ended.append(k)
        if ended:
            self._leave(ended)
        for row, token in zip(rows, picked, strict=True):
            if token not in self.stops:
                self.told(row.place, token)
        for k in ended:
            row = rows[k]
            self.ended(row.place, row.ids[row.begin :], row.ids[-1] in self.stops)

    def _leave(self, ended: Sequence[int]) -> None:
        """Close up: the last rows take the slots of those that ended."""
        gone = set(ended)
        left = len(self.active) - len(gone)
        targets = [k for k in ended if k < left]
        sources = [k for k in range(left, len(self.active)) if k not in gone]
        if targets:
            self.slots.move(sources, targets)
        rows = list(self.active)
        for source, target in zip(sources, targets, strict=True):
            rows[target] = rows[source]
        self.active = rows[:left]
