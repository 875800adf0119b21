"""Prompts with a common beginning: it is read once, and its keys and values are used for all of them.

    prefix [L] --backbone--> cache --copied for B rows--> suffixes [B, S] --backbone--> hidden states at chosen positions

Inference only.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .lm import base_language_model, find_backbone


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
        ids = torch.tensor([list(prefix)], device=next(model.parameters()).device)
        cache = DynamicCache(config=base_language_model(model).config.get_text_config())
        self.cache = _read(model, ids, torch.ones_like(ids), cache, 0).past_key_values

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


def _read(model: nn.Module, ids: Tensor, mask: Tensor, cache: Any, start: int) -> Any:
    backbone = find_backbone(model)
    extra = {}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        places = torch.arange(start, start + ids.shape[1], device=ids.device)
        extra["position_ids"] = places.expand(len(ids), -1)
    return backbone(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
