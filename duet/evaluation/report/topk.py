"""The likeliest first tokens of an answer, before and after unlearning.

    ids = top-k of before  u  top-k of after        values: log-probabilities of these ids from each model

    log p(id) = logit(id) - logsumexp over the vocabulary: a shift that all logits share changes nothing.

Two passes over the vocabulary and a gather a model and query; no [V] tensor of logits is kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from duet_kernels import linear_gather, linear_logsumexp, linear_topk

from ...data.prompts import Prompting, PromptRenderer
from ...model.switches import evaluating
from ..scoring import Forced, forced_hidden

TOPK = "topk.json"
MEASURE = "log_probability"  # topk.json of duet 0.1 holds logits, and no "measure"


@torch.no_grad()
def compare_topk(
    before: nn.Module,
    after: nn.Module,
    tokenizer: Any,
    queries: Sequence[str],
    *,
    k: int = 8,
    instruction: str | None = None,
    prompting: Prompting | None = None,
) -> list[dict[str, Any]]:
    """Log-probabilities of the tokens that either model puts on top as the first of its answer.

    Args:
        before, after: transformers causal language models with one vocabulary.
        tokenizer: of both.
        queries: questions, asked with the chat template where there is one.
        k: how many of each model.
        instruction: a steering prefix: the teacher is `before` behind it.
        prompting: how prompts are written for `after`; None: the defaults.

    Returns:
        a query each: {"question", "ids", "tokens", "before", "after", "teacher" (None without an instruction)}; between
        k and 2 k tokens, the likeliest before first; values in nats.

    Raises:
        ValueError: `k`, or the vocabularies differ.
    """
    if k < 1:
        raise ValueError(f"k: wanted an integer >= 1, got {k}")
    renderer = PromptRenderer(tokenizer, **vars(prompting or Prompting()))
    compared = []
    for question in queries:
        plain = renderer.encode((("user", question),))
        states = {"before": _last_state(before, plain), "after": _last_state(after, plain)}
        wanted, got = (head.num_ids for _, head in states.values())
        if wanted != got:
            raise ValueError(f"after: wanted the vocabulary of before, {wanted} ids, got {got}")
        tops = (linear_topk(hidden, head, min(k, wanted)).indices[0] for hidden, head in states.values())
        ids = list(dict.fromkeys(id_ for top in tops for id_ in top.tolist()))
        if instruction is not None:
            steered = renderer.encode((("user", question),), instruction)
            states["teacher"] = _last_state(before, steered)
        values = {name: _logprobs(*state, ids) for name, state in states.items()}
        order = sorted(range(len(ids)), key=lambda i: -values["before"][i])
        shown = {name: [each[i] for i in order] for name, each in values.items()}
        ids = [ids[i] for i in order]
        tokens = [tokenizer.decode([id_]) for id_ in ids]
        told = {"question": question, "ids": ids, "tokens": tokens, **shown}
        compared.append(told | {"teacher": shown.get("teacher")})
    return compared


def _last_state(model: nn.Module, prompt: list[int]) -> tuple[torch.Tensor, Any]:
    """`[1, D]` hidden state where the answer's first token is predicted, and the head."""
    with evaluating(model):
        return forced_hidden(model, [Forced(prompt, [0])], 0)[:2]


def _logprobs(hidden: torch.Tensor, head: Any, ids: list[int]) -> list[float]:
    chosen = torch.tensor([ids], device=hidden.device)
    logits = linear_gather(hidden, head, chosen)[0].float()
    return (logits - linear_logsumexp(hidden, head).float()).tolist()
