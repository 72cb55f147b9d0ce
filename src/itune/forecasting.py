"""What a run will cost, told: its parts, in words, as plain data, and kept for the run to come."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from itune import cache, recipes, runs, storage

WIDTH = 66  # of a line's text, beside its name


@dataclass(frozen=True)
class Forecast:
    """What a run will cost. memory: bytes of one device by part, and `peak`, their sum; available:
    bytes that there are; seconds: of its steps; beside: of measuring the held-out loss; cost in the
    user's currency; energy in watt-hours. how: what seconds follow from, in words.
    """

    computing: str
    processes: int
    parameters: int
    trainable: int
    tokens: int
    steps: int
    flops: int
    memory: Mapping[str, int]
    available: int
    micro_batch_tokens: int
    disk: int
    seconds: float
    beside: float
    how: str
    path: str
    cost: float | None
    energy: float | None

    @property
    def fits(self) -> bool:
        """Whether the memory of each device holds its part."""
        return self.memory["peak"] <= self.available

    def plain(self) -> dict[str, Any]:
        """As `--plan --json` prints it."""
        named = asdict(self)
        return {
            **{key: named[key] for key in ("parameters", "trainable", "tokens", "steps", "flops")},
            "memory_bytes": dict(self.memory),
            "available_bytes": self.available,
            "disk_bytes": self.disk,
            "seconds": round(self.seconds, 3),
            "heldout_seconds": round(self.beside, 3),
            "cost": self.cost,
            "energy_wh": self.energy,
            "processes": self.processes,
            "micro_batch_tokens": self.micro_batch_tokens,
            "computing": self.computing,
            "how": self.how,
            "fits": self.fits,
        }


def keep(found: Forecast, recipe: recipes.Recipe) -> None:
    """Keep a forecast where the run of its recipe looks for it."""
    path = _kept_at(recipe, found.processes)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write(path, runs.to_json(found.plain()))


def kept(recipe: recipes.Recipe, processes: int) -> dict[str, Any] | None:
    """The last forecast of a recipe as plain data, or None."""
    path = _kept_at(recipe, processes)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _kept_at(recipe: recipes.Recipe, processes: int) -> Path:
    return cache.root() / "plans" / f"{recipes.digest(recipe)[:32]}-{processes}.json"


# --- in words -----------------------------------------------------------------------------


def gigabytes(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def shares(parts: Mapping[str, int]) -> str:
    """Parts of the memory, the largest first, without what is next to nothing."""
    each = sorted(((v, k) for k, v in parts.items() if k != "peak"), reverse=True)
    return ", ".join(f"{k} {gigabytes(v)}" for v, k in each if v > 0.005 * parts["peak"])


def clock(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min"


def rows(found: Forecast) -> list[list[str]]:
    """A forecast as the lines of a table of 80 columns."""
    each = found.tokens / max(found.seconds, 1e-9)
    parts = {
        "model": f"{found.parameters:,} parameters, {found.trainable:,} of them trained",
        "steps": f"{found.steps:,}, of {found.tokens:,} tokens in all",
        "computing": f"{found.flops:.2e} operations, {found.computing}; {found.path}",
        "memory": f"{gigabytes(found.memory['peak'])} of {gigabytes(found.available)}: "
        f"{shares(found.memory)}",
        "disk": gigabytes(found.disk),
        "time": f"{clock(found.seconds)}, {each:,.0f} tokens a second ({found.how})",
    }
    if found.beside >= 1:
        parts["time"] += f", and {clock(found.beside)} for the held-out loss"
    if found.cost is not None:
        parts["cost"] = f"{found.cost:,.2f}" if found.cost >= 1 else f"{found.cost:.2g}"
    if found.energy is not None:
        parts["energy"] = f"{found.energy / 1000:.3g} kWh"
    return [
        [name if number == 0 else "", line]
        for name, text in parts.items()
        for number, line in enumerate(textwrap.wrap(text, WIDTH))
    ]
