"""The keys and values of attention while decoding: a slot for each row, a column for each position.

Needs torch. A token stands at the column of its position, so rows of unequal lengths need no
padding, a row that has ended gives its slot to another, and nothing is copied from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

SLIDING, FULL = "sliding_attention", "full_attention"
# The implementations that take a ready-made mask [rows, 1, queries, columns].
MASKED = ("sdpa", "eager")


@dataclass
class _Place:
    """Where the next call of the model writes: rows `first` to `first + rows`.

    columns int64 [rows]: one column a row; or, where that is None, all columns from `start`.
    width: how many columns attention sees. size: (slots, columns) of a new layer.
    """

    size: tuple[int, int]
    first: int = 0
    start: int = 0
    columns: torch.Tensor | None = None
    width: int = 0


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, each [slots, heads, columns, size]."""

    is_sliding = False

    def __init__(self, place: _Place) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = place

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        slots, columns = self.place.size

        def blank(like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros((slots, like.shape[1], columns, like.shape[3]))

        self.keys, self.values = blank(key_states), blank(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place, rows = self.place, key_states.shape[0]
        seen = []
        stores: Any = (self.keys, self.values)
        for store, new in zip(stores, (key_states, value_states), strict=True):
            mine = store[place.first : place.first + rows]
            if place.columns is None:
                mine[:, :, place.start : place.start + new.shape[2]] = new
            else:
                mine[torch.arange(rows, device=new.device), :, place.columns] = new.squeeze(2)
            seen.append(mine[:, :, : place.width])
        return seen[0], seen[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.width, 0

    def get_seq_length(self) -> int:
        return self.place.start

    def get_max_length(self) -> int:
        return -1

    def each(self, change: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)


@dataclass
class Slots:
    """The cache of a model for some rows at once.

    Rows in use are always the first ones. A `prefix` that was kept is put into new rows.
    """

    model: Any
    place: _Place
    cache: Any = None
    kept: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, model: Any, rows: int, columns: int) -> Slots:
        """Room for so many rows of so many tokens each; the memory is taken at the first call."""
        place = _Place((rows, columns))
        layers = model.config.get_text_config().num_hidden_layers
        return cls(model, place, Cache(layers=[_Layer(place) for _ in range(layers)]))

    # --- the model's two calls ---

    def read(self, ids: torch.Tensor, *, first: int, start: int) -> None:
        """Put tokens into the rows from `first` on, at the columns from `start` on.

        ids int64 [rows, tokens], short ones filled at the right: what stands after a row's last
        token is never looked at, and overwritten when the row comes there.
        """
        tokens = ids.shape[1]
        at = torch.arange(start, start + tokens, device=ids.device)
        self._to(first=first, start=start, columns=None, width=start + tokens)
        # From nothing on, the model knows a faster way than a mask.
        mask = self._mask(at[None]) if start else None
        self._call(ids, at.expand(len(ids), -1), mask)

    def step(self, ids: torch.Tensor, positions: torch.Tensor, width: int) -> torch.Tensor:
        """Logits [rows, vocabulary] after one more token of each row from the first on.

        ids, positions int64 [rows]; width: the largest position and one.
        """
        self._to(first=0, start=width - 1, columns=positions, width=width)
        output = self._call(ids[:, None], positions[:, None], self._mask(positions[:, None]))
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def _to(self, **where: Any) -> None:
        for name, value in where.items():
            setattr(self.place, name, value)

    def _call(self, ids: torch.Tensor, positions: torch.Tensor, mask: Any) -> Any:
        return self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def _mask(self, positions: torch.Tensor) -> Any:
        """What each query may see: [rows, 1, queries, columns], by kind of layer where they differ.

        positions int64 [rows, queries].
        """
        config = self.model.config.get_text_config()
        behind = positions[:, None, :, None] - torch.arange(
            self.place.width, device=positions.device
        )
        window: Any = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        full = self._fit(behind >= 0)
        if kinds <= {FULL} and (kinds or window is None):
            return full
        sliding = self._fit((behind >= 0) & (behind < window))
        return {FULL: full, SLIDING: sliding} if kinds else sliding

    def _fit(self, seen: torch.Tensor) -> torch.Tensor:
        """A mask as the attention of this model takes it."""
        if self.model.config._attn_implementation == "sdpa":
            return seen
        dtype = self.model.dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    # --- rows ---

    def keep(self, tokens: int) -> None:
        """Keep what the first row holds in its first columns as a prefix for others."""
        self.kept = [
            (each.keys[:1, :, :tokens].clone(), each.values[:1, :, :tokens].clone())
            for each in self.cache.layers
            if each.is_initialized
        ]

    def put(self, first: int, rows: int) -> None:
        """The kept prefix into the first columns of so many rows."""
        layers = [each for each in self.cache.layers if each.is_initialized]
        for each, (keys, values) in zip(layers, self.kept, strict=True):
            each.keys[first : first + rows, :, : keys.shape[2]] = keys
            each.values[first : first + rows, :, : values.shape[2]] = values

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Rows into the place of others."""

        def moved(store: torch.Tensor) -> torch.Tensor:
            store[targets, :, : self.place.width] = store[sources, :, : self.place.width]
            return store

        for each in self.cache.layers:
            each.each(moved)

    def resize(self, rows: int, columns: int, used: int) -> None:
        """Another size; the first `used` rows are kept, as far as the new columns reach."""
        shared = min(columns, self.place.size[1])

        def resized(store: torch.Tensor) -> torch.Tensor:
            new = store.new_zeros((rows, store.shape[1], columns, store.shape[3]))
            new[:used, :, :shared] = store[:used, :, :shared]
            return new

        self.place.size = (rows, columns)
        for each in self.cache.layers:
            each.each(resized)


# --- which models ---------------------------------------------------------------------------


def refused(model: Any) -> str:
    """Why this model's cache is none of keys and values in columns; nothing where it may be."""
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder and a decoder"
    kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if kinds:
        return f"its layers hold {', '.join(sorted(kinds))}"
    chosen = config._attn_implementation
    if chosen not in MASKED:
        return f"its attention is computed by {chosen}"
    known = hasattr(config, "num_hidden_layers") and hasattr(config, "num_attention_heads")
    return "" if known else "its config names no layers"


def bytes_per_token(model: Any) -> int:
    """What the keys and values of a token take in all layers: by the model's config."""
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


# How far log-likelihoods may be apart from those without a cache: rounding alone.
APART = {torch.float32: 1e-3, torch.float64: 1e-6}
APART_ELSE = 0.3


def disagrees(model: Any, ids: list[int]) -> str:
    """Why this model does not go with slots; nothing where it answers as it does without a cache.

    ids: any tokens of the model, of which a few are read.
    """
    row = (ids * 10)[:10]
    try:
        apart = _apart(model, row)
    except torch.OutOfMemoryError:
        raise
    except (
        AttributeError,
        AssertionError,
        TypeError,
        ValueError,
        IndexError,
        KeyError,
        RuntimeError,
    ) as error:
        return f"its cache takes no slots ({type(error).__name__})"
    limit = APART.get(model.dtype, APART_ELSE)
    return "" if apart <= limit else f"its cache in slots answers otherwise (by {apart:.2g})"


@torch.no_grad()
def _apart(model: Any, row: list[int]) -> float:
    """The largest difference over two rows of one prefix, in their first two steps."""
    whole = torch.tensor([row, row], device=model.device)
    whole[1, 5:] = whole[0, 5:].flip(0)
    slots = Slots.of(model, 3, len(row))
    slots.read(whole[:1, :2], first=0, start=0)
    slots.keep(2)
    slots.put(0, 2)
    slots.read(whole[:, 2:7], first=0, start=2)
    plain = model(input_ids=whole, use_cache=False).logits.float().log_softmax(-1)
    worst = 0.0
    # The first row is one token further than the second, as two answers under way are.
    for far in (8, 9):
        at = torch.tensor([far - 1, far - 2], device=model.device)
        found = slots.step(whole[torch.arange(2, device=model.device), at], at, far)
        wanted = plain[torch.arange(2, device=model.device), at]
        worst = max(worst, float((found.float().log_softmax(-1) - wanted).abs().max()))
    return worst
