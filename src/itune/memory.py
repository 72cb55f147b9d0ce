"""Memory: what is left, what was taken, how its end is told from other faults and begun again."""

from __future__ import annotations

import contextlib
import random
import re
import sys
from pathlib import Path
from typing import Any

LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container (cgroups v2)
# What torch, its CPU allocator, cuBLAS and the allocator of Apple's GPUs write; the class alone
# does not tell, as most of them raise a plain RuntimeError.
SAID = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")


def is_short(error: BaseException) -> bool:
    """Whether an error says no more than that memory has run out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in SAID)


def told(error: BaseException) -> str:
    """What such an error says, short and on one line."""
    text = str(error) or type(error).__name__
    return " ".join(text.splitlines()[0].split())[:160]


class Drawn:
    """Every random state of this process at a moment; cheap enough for each step."""

    def __init__(self) -> None:
        import torch

        self._cuda: Any = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        self._cpu, self._python = torch.get_rng_state(), random.getstate()

    def restore(self) -> None:
        """Have the same numbers drawn again."""
        import torch

        torch.set_rng_state(self._cpu)
        random.setstate(self._python)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


def left(device: Any) -> int | None:
    """Bytes that this process may still take of a GPU's memory; None where nothing is measured."""
    if device.type != "cuda":
        return None
    torch = sys.modules["torch"]
    outside, _ = torch.cuda.mem_get_info(device)
    inside = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(outside + inside)


def host() -> int:
    """Bytes of the machine's memory that are there to be taken, by its container's limit too."""
    import psutil

    found = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no container, or none with a limit
        found = min(found, int(LIMIT.read_text()))
    return found


class Peak:
    """The most memory that was in use within, in `bytes` beyond that before.

    Of a GPU what torch had given out, else what this process held; there Linux alone tells.
    """

    def __init__(self, device: Any) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            cuda = sys.modules["torch"].cuda
            cuda.reset_peak_memory_stats(self.device)
            self._before = cuda.memory_allocated(self.device)
        else:
            with contextlib.suppress(OSError):  # no such file on other systems
                Path("/proc/self/clear_refs").write_text("5")  # of proc(5): the peak begins anew
            self._before = held("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            peak = sys.modules["torch"].cuda.max_memory_allocated(self.device)
        else:
            peak = held("VmHWM")
        self.bytes = peak - self._before


def held(field: str = "VmRSS") -> int:
    """Bytes that this process holds (`VmRSS`), or held at most (`VmHWM`); 0 where none tells."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found.group(1)) if found else 0


def free() -> None:
    """Give back what an attempt left that failed."""
    import gc

    torch = sys.modules["torch"]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
