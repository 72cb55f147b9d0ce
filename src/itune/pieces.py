"""Tensors in safetensors files, of which each of several processes may have written its own rows.

Needs torch. A file of process 2 of 4 is `weights-00002-of-00004.safetensors`, as the hub names the
parts of a model. A tensor that is in several of them is their rows, one after the other, so
that any number of processes reads what any number wrote, and none of it more than it keeps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Peers:
    """The processes that write or read files together: this one's number, how many, and how the
    items of all lists come to each of them.
    """

    index: int
    count: int
    gathered: Callable[[list[Any]], list[Any]]


ALONE = Peers(0, 1, list)


def name(kind: str, peers: Peers) -> str:
    """The file that a process writes its rows of some tensors to."""
    if peers.count == 1:
        return f"{kind}{SUFFIX}"
    return f"{kind}-{peers.index + 1:05d}-of-{peers.count:05d}{SUFFIX}"


def files(kind: str, listed: Iterable[str]) -> list[str]:
    """The files of a kind among some names: that of one process, or those of as many as wrote."""
    mine, whole = set(listed), name(kind, ALONE)
    if whole in mine:
        return [whole]
    counts = {int(m[1]) for n in mine if (m := re.fullmatch(rf"{kind}-\d+-of-(\d+){SUFFIX}", n))}
    sets = [[name(kind, Peers(k, count, list)) for k in range(count)] for count in sorted(counts)]
    return min(sets, key=lambda each: len(set(each) - mine), default=[whole])


def missing(kind: str, listed: Iterable[str]) -> str | None:
    """The first file of a kind that a list of names lacks; None where it has all of them."""
    mine = set(listed)
    return next((each for each in files(kind, mine) if each not in mine), None)


def bounds(rows: int, index: int, count: int) -> tuple[int, int]:
    """The rows that a process keeps of a tensor, as `torch.chunk` and FSDP2 have it."""
    each = -(-rows // count)
    return min(index * each, rows), min((index + 1) * each, rows)


def own(tensor: torch.Tensor, peers: Peers) -> torch.Tensor:
    """This process's rows of a tensor, a view; of one without dimensions, the whole."""
    if tensor.dim() == 0:
        return tensor
    start, stop = bounds(tensor.shape[0], peers.index, peers.count)
    return tensor[start:stop]


class Pieces(Mapping[str, torch.Tensor]):
    """The tensors of a kind in a folder by their names, on the CPU, each read when it is asked for.

    Raises FileNotFoundError for a folder that lacks one of the kind.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._held: dict[str, list[Any]] = {}
        for each in files(kind, [path.name for path in folder.iterdir()]):
            file: Any = safe_open(folder / each, framework="pt")
            for key in file.keys():  # noqa: SIM118 - it cannot be iterated over
                self._held.setdefault(key, []).append(file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, key: str) -> torch.Tensor:
        held = self._held[key]
        if len(held) == 1 or not held[0].get_slice(key).get_shape():
            tensor: torch.Tensor = held[0].get_tensor(key)
            return tensor
        return torch.cat([file.get_tensor(key) for file in held])

    def shape(self, key: str) -> torch.Size:
        """The shape of a whole tensor."""
        shapes = [file.get_slice(key).get_shape() for file in self._held[key]]
        return torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else [])

    def own(self, key: str, peers: Peers) -> torch.Tensor:
        """This process's rows of a tensor; no others are read."""
        held = self._held[key]
        parts = [file.get_slice(key) for file in held]
        shapes = [part.get_shape() for part in parts]
        if not shapes[0]:
            return self[key]
        start, stop = bounds(sum(shape[0] for shape in shapes), peers.index, peers.count)
        found, first = [], 0
        for part, (rows, *_) in zip(parts, shapes, strict=True):
            low, high = max(start - first, 0), min(stop - first, rows)
            if low < high:
                found.append(part[low:high])
            first += rows
        if not found:  # fewer rows than processes
            found = [parts[0][0:0]]
        return found[0] if len(found) == 1 else torch.cat(found)
