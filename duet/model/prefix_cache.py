"""Prompts with a common beginning: it is read once, and its keys and values are used for all of them.

    prefix [L] --backbone--> cache --copied for B rows--> suffixes [B, S] --backbone--> hidden states at chosen positions

`PrefixCache` holds one prefix, for prompts that all begin with it: `duet cache` asks them together. `PrefixTable` holds many
side by side, and each row of a batch names its own: a live teacher, which gets its rows in the order of training.

Inference only.
"""

import copy
import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .lm import base_language_model, find_backbone

CACHE_ARGUMENTS = ("cache", "past_key_values")  # of a backbone; before transformers 5.24 the second


def common_length(sequences: Sequence[list[int]]) -> int:
    """Length of the common beginning of all sequences, at most one less than the shortest: something must remain to read.

    Example:
        >>> common_length([[1, 2, 3, 4], [1, 2, 3, 5, 6]]), common_length([[1, 2], [1, 2]])
        (3, 1)
    """
    first, last = min(sequences), max(sequences)  # all sequences lie between these two
    most = min(map(len, sequences)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


class PrefixCache:
    """Keys and values of one prefix.

    Args:
        model: a causal language model.
        prefix: token ids, at least one.
    """

    def __init__(self, model: nn.Module, prefix: Sequence[int]):
        self.length = len(prefix)
        self.cache = _cache_of(model, [prefix])

    def hidden_states_at(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor
    ) -> Tensor:
        """`lm.hidden_states_at` of prefix + suffix, given the suffixes.

        Args:
            input_ids, attention_mask: `[B, S]` the suffixes, padded on the **right**.
            positions: `[N]` indices into the flattened suffixes.

        Returns:
            `[N, D]`.
        """
        cache = copy.deepcopy(self.cache)  # the model appends to what it is given
        cache.batch_repeat_interleave(len(input_ids))
        mask = torch.cat([attention_mask.new_ones(len(input_ids), self.length), attention_mask], 1)
        output = _read(model, input_ids, mask, cache, self.length)
        return output.last_hidden_state.flatten(0, 1).index_select(0, positions)


class PrefixTable:
    """Keys and values of some prefixes, for batches whose rows begin with one or another of them.

    For each layer `[n, heads, L, d]`: the shorter ones stand at the right, behind zeros that the attention mask hides.
    """

    def __init__(self) -> None:
        # Keys and values of the first layer, keys and values of the second, ...
        self.tables: list[Tensor] = []
        self.lengths = torch.empty(0, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.tables)

    def add(self, model: nn.Module, prefixes: Sequence[Sequence[int]], at_once: int) -> None:
        """Reads more prefixes, those of one length together.

        Args:
            model: a causal language model for which `cannot_reuse` knows no reason.
            prefixes: token ids, at least one each.
            at_once: so many are read together.
        """
        device, first = next(model.parameters()).device, len(self.lengths)
        sizes = [len(prefix) for prefix in prefixes]
        self.lengths = torch.cat([self.lengths.to(device), torch.tensor(sizes, device=device)])
        grown = max(max(sizes) - self.tables[0].shape[2], 0) if self.tables else 0
        self.tables = [F.pad(table, (0, 0, grown, 0, 0, 0, 0, len(sizes))) for table in self.tables]
        for size, group in groupby(sorted(range(len(sizes)), key=sizes.__getitem__), key=sizes.__getitem__):
            numbers = list(group)
            for start in range(0, len(numbers), at_once):
                some = numbers[start : start + at_once]
                read = _keys_and_values(model, [prefixes[i] for i in some])
                if not self.tables:
                    shape = len(self.lengths), max(sizes)
                    self.tables = [p.new_zeros(shape[0], p.shape[1], shape[1], p.shape[3]) for p in read]
                rows = torch.tensor([first + i for i in some], device=device)
                for table, part in zip(self.tables, read, strict=True):
                    table[rows, :, table.shape[2] - size :] = part

    def hidden_states_at(
        self, model: nn.Module, which: Tensor, input_ids: Tensor, attention_mask: Tensor, positions: Tensor
    ) -> Tensor:
        """What `lm.hidden_states_at` gives for prefixes and suffixes, from the suffixes alone.

        Args:
            which: `[B]` the number of each row's prefix, in the order of `add`.
            input_ids, attention_mask, positions: as in `PrefixCache.hidden_states_at`.
        """
        longest, lengths = self.tables[0].shape[2], self.lengths[which, None]
        columns = torch.arange(longest, device=which.device)
        mask = torch.cat([(columns >= longest - lengths).to(attention_mask.dtype), attention_mask], 1)
        layers: list[Any] = [
            _InFront(*pair, which) for pair in zip(self.tables[::2], self.tables[1::2], strict=True)
        ]
        output = _read(model, input_ids, mask, Cache(layers=layers), lengths)
        return output.last_hidden_state.flatten(0, 1).index_select(0, positions)


class _InFront(DynamicLayer):
    """A layer's prefixes, which stand in front of what is read; keeps nothing of that."""

    def __init__(self, keys: Tensor, values: Tensor, which: Tensor):
        super().__init__()
        self.tables, self.which, self.is_initialized = (keys, values), which, True

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        old_keys, old_values = (table.index_select(0, self.which) for table in self.tables)
        return torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)

    def get_seq_length(self) -> int:
        return self.tables[0].shape[2]


def cannot_reuse(model: nn.Module, in_order: bool = False) -> str | None:
    """Why keys and values of a prefix cannot be read once for this model; None: they can.

    A layer that attends to a window forgets the prefix as it goes, and a recurrent one has no keys and values.

    Args:
        model: a causal language model.
        in_order: whether a copy of one prefix's cache is gone on with (`PrefixCache`), which windows allow.
    """
    name = type(base_language_model(model)).__name__
    if not any(argument in _arguments(model) for argument in CACHE_ARGUMENTS):
        return f"{name} takes no cache of keys and values"
    usable = {DynamicLayer, DynamicSlidingWindowLayer} if in_order else {DynamicLayer}
    kinds = {kind.__name__ for kind in {type(layer) for layer in _new_cache(model).layers} - usable}
    return f"{name} has layers whose cache is a {', '.join(sorted(kinds))}" if kinds else None


def bytes_per_token(model: nn.Module) -> int:
    """What keys and values of one token take."""
    return sum(part.nbytes for part in _keys_and_values(model, [[0]]))


def _keys_and_values(model: nn.Module, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of sequences of one length `L`, layer by layer: `[B, heads, L, d]` keys and values in turn."""
    return [part for layer in _cache_of(model, sequences).layers for part in (layer.keys, layer.values)]


def _cache_of(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Any:
    """What the model keeps of sequences of one length."""
    ids = torch.tensor([list(sequence) for sequence in sequences], device=next(model.parameters()).device)
    cache = _new_cache(model)
    _read(model, ids, torch.ones_like(ids), cache, 0)
    return cache


def _arguments(model: nn.Module) -> list[str]:
    return list(inspect.signature(find_backbone(model).forward).parameters)


def _new_cache(model: nn.Module) -> DynamicCache:
    return DynamicCache(config=base_language_model(model).config.get_text_config())


def _read(model: nn.Module, ids: Tensor, mask: Tensor, cache: Any, start: int | Tensor) -> Any:
    """The backbone's output; the first token of each row stands at `start`, an int or `[B, 1]`. Appends to `cache`."""
    known = _arguments(model)
    extra = {next(argument for argument in CACHE_ARGUMENTS if argument in known): cache}
    if "position_ids" in known:
        places = start + torch.arange(ids.shape[1], device=ids.device)
        extra["position_ids"] = places.expand(len(ids), -1)
    return find_backbone(model)(input_ids=ids, attention_mask=mask, use_cache=True, **extra)
