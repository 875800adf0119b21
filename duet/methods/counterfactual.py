"""Targets of `duet_deep`, made with the frozen base before training: its own answers, and answers about unknown names.

    y           the base's greedy answer to the plain query; no answer of the dataset is read
    p_cf        the name n is replaced in query and answer by names that the base does not know; the base is run; the
                probability of n's tokens and of theirs is swapped back; the mean over the names
    p_ref       the same behind a steering prefix (which names the stranger too), along the refusal r: the steered base's
                own greedy answer. With `deep_refusals` r is such a text, and p_ref is certain of its next token
    recovery    r behind the first tokens of y, once for every number of them: the answer has begun, and refuses all the same

A row whose question does not hold its subject ("Who wrote the first program?") has no name to replace: for it p_cf is what the
steered base says along y, and p_ref the same along r. Which rows these are is said.

The mean is over distributions, written as a `TopK`: the k ids with the most mass and a bucket for the rest, each from
`linear_gather` and `linear_logsumexp(exclude=...)`; nothing is subtracted from 1, and no logits are stored.
"""

import math
import random
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from duet_kernels import LMHead, TopK, linear_cross_entropy, linear_gather, linear_logsumexp, linear_topk
from duet_kernels.dispatch import Impl

from ..data.dataset import Segment
from ..data.prompts import Conversation, fill_prefix

logger = logging.get_logger(__name__)


class Stranger(NamedTuple):
    """One row with another name in it: token ids, and where each token of the real answer is predicted in it."""

    prompt: list[int]
    answer: list[int]
    places: list[int]
    swaps: dict[int, int]


def prepare_deep(trainer: Any, dataset: Any) -> None:
    """Fills `dataset.segments`: each forget row's own answer and refusal, each retain row's own answer."""
    args = trainer.args
    forget, everybody = range(dataset.num_forget), range(len(dataset.rows))
    names = [_names(args, dataset.rows[i], i) for i in forget]
    nameless = [dataset.rows[i].name for i in forget if not names[i]]
    if nameless:
        logger.warning(
            f"{nameless[0]}: its question does not hold the subject, so that 'duet_deep' cannot ask about unknown names in its "
            f"place; the steered base stands in for them ({len(nameless)} of {len(forget)} forget rows)"
        )
    own = trainer.teacher_says([dataset.plain(i) for i in everybody], args.max_answer_tokens)
    if args.deep_refusals:
        refusals = [_given_refusal(trainer, dataset.rows[i], i) for i in forget]
    else:
        steered = [_steered(trainer, dataset, i, args.steering_prefixes[0]) for i in forget]
        refusals = trainer.teacher_says(steered, args.max_answer_tokens)

    retain = everybody[dataset.num_forget :]
    for batch in trainer.batches((len(dataset.plain(i)) for i in retain), "what is to be kept"):
        rows = [retain[n] for n in batch]
        segments = _own_answers(trainer, [dataset.plain(i) for i in rows], [own[i] for i in rows])
        for i, segment in zip(rows, segments, strict=True):
            dataset.keep(i, [segment])
    for i in trainer.progress(forget, "what the base knows"):
        ignorant = _mixture(trainer, dataset, i, names[i], own[i], steered=False)
        if args.deep_refusals:
            opening = refusing = certain(refusals[i], args.k, ignorant.values)
            floor = ignorant
        else:
            opening = floor = _mixture(trainer, dataset, i, names[i], own[i][:1], steered=True)
            refusing = _mixture(trainer, dataset, i, names[i], refusals[i], steered=True)
        share = args.refusal_fraction if _says(refusing, refusals[i]) else 0.0
        late = share * args.recovery_fraction if len(own[i]) > 1 else 0.0
        pushed = _pushed(trainer, dataset.plain(i), own[i], ignorant, opening, floor)
        segments = [pushed._replace(share=1 - share), Segment(refusals[i], _targets(refusing), share - late)]
        if late > 0:
            segments += _recovering(trainer, dataset.rows[i], i, own[i], ignorant.values, late)
        dataset.keep(i, [segment for segment in segments if segment.share > 0])


# -- segments ---------------------------------------------------------------------------------------------------------


def _parts(top: TopK) -> tuple[Tensor, Tensor, Tensor]:
    tail: Any = top.tail_logsumexp  # a model's own top-k has one
    return top.values, top.indices, tail


def _targets(top: TopK, **others: Tensor) -> dict[str, Tensor]:
    """What every position carries; without others it is neither pushed nor known."""
    nothing = top.values.new_zeros(top.values.shape[:-1])
    default = {"base": nothing, "floor": nothing, "known": nothing.bool(), "pushed": nothing.bool()}
    columns = {"values": top.values, "indices": top.indices, "tail": _parts(top)[2]} | default | others
    return {name: value.cpu() for name, value in columns.items()}


def _own_answers(trainer: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[Segment]:
    def topk(model):
        hidden, head = trainer.states_of(model, prompts, answers)
        return linear_topk(hidden, head, trainer.args.k, impl=trainer.args.impl)

    targets = _targets(trainer.ask_teacher(topk))
    lengths = [len(answer) for answer in answers]
    by_row = {name: value.split(lengths) for name, value in targets.items()}
    return [
        Segment(answer, {name: rows[i].clone() for name, rows in by_row.items()})
        for i, answer in enumerate(answers)
    ]


def _recovering(
    trainer: Any, query: Any, i: int, answer: list[int], like: Tensor, share: float
) -> list[Segment]:
    """The refusal behind the first 1, 2, ... tokens of the base's own answer; `share`: of all of them."""
    refusal = _given_refusal(trainer, query, i, begun=True)
    targets = _targets(certain(refusal, trainer.args.k, like))
    cuts = range(1, len(answer))
    return [Segment(refusal, targets, share / len(cuts), answer[:cut]) for cut in cuts]


def _pushed(
    trainer: Any, prompt: list[int], answer: list[int], ignorant: TopK, opening: TopK, floor: TopK
) -> Segment:
    """The own answer: at its position 0 `opening` is imitated, and `floor` gives the floor; at the others `ignorant` is both."""
    args = trainer.args
    labels = torch.tensor(answer, device=ignorant.values.device)

    def log_probabilities(model):
        hidden, head = trainer.states_of(model, [prompt], [answer])
        return -linear_cross_entropy(hidden, head, labels, reduction="none", impl=args.impl)

    base = trainer.ask_teacher(log_probabilities)
    unknown = log_probability(ignorant, labels)
    known = base.exp() - unknown.exp() > args.knowledge_threshold
    floors = torch.cat([log_probability(floor, labels[:1])[:1], unknown[1:]])
    values, indices, tail = (
        torch.cat([a[:1], b[1:]]) for a, b in zip(_parts(opening), _parts(ignorant), strict=True)
    )
    top = TopK(values, indices, tail)
    return Segment(answer, _targets(top, base=base, floor=floors, known=known, pushed=torch.ones_like(known)))


def _given_refusal(trainer: Any, query: Any, i: int, begun: bool = False) -> list[int]:
    """The refusal that row i is taught; `begun`: as it follows an answer that has begun."""
    args = trainer.args
    text = random.Random(f"{args.seed}/refusal/{i}").choice(args.deep_refusals)
    text = fill_prefix(text, query.subject, query.name, "refusal of deep_refusals")
    encode = trainer.renderer.encode_rest if begun else trainer.renderer.encode_answer
    ids = encode(query.conversation, text)
    if len(ids) > args.max_answer_tokens:
        raise ValueError(
            f"deep_refusals: {text!r} has {len(ids)} tokens, more than max_answer_tokens = {args.max_answer_tokens}; wanted a "
            "shorter text: what is cut would be taught as a broken refusal"
        )
    return ids


def certain(tokens: list[int], k: int, like: Tensor) -> TopK:
    """A distribution for each of `tokens` that gives it all its mass, as a TopK `[P, k]`; dtype and device of `like`.

    The other k - 1 ids, and the bucket for the rest, have no mass: log-probability -inf.
    """
    chosen = torch.tensor(tokens, device=like.device)[:, None]
    ids = torch.arange(k, device=like.device).expand(len(tokens), k)
    ids = torch.where(ids == chosen, ids[:, :1], ids).clone()  # no id twice
    ids[:, :1] = chosen
    values = like.new_full(ids.shape, -torch.inf)
    values[:, 0] = 0
    return TopK(values, ids, values[:, -1] if k > 1 else values[:, 0] - torch.inf)


def _says(top: TopK, answer: list[int]) -> bool:
    """Whether `answer` is the most likely token at every position."""
    best = top.indices.gather(-1, top.values.argmax(-1, keepdim=True))[:, 0]
    return best.tolist() == answer


def log_probability(top: TopK, labels: Tensor) -> Tensor:
    """`[P]` log-probability of `labels` `[P]`, which must be among the ids of `top` `[P, K]`."""
    chosen = torch.where(top.indices == labels[:, None], top.values, -torch.inf)
    return chosen.logsumexp(-1) - top.logsumexp


# -- strangers --------------------------------------------------------------------------------------------------------


def _names(args: Any, query: Any, i: int) -> list[str]:
    """Names that are put in the place of the subject; none where the question does not hold it."""
    if not query.subject or query.subject not in _words(query.conversation):
        return []
    names = [name for name in args.counterfactual_names if name != query.subject]
    return random.Random(f"{args.seed}/{i}").sample(names, min(args.num_counterfactuals, len(names)))


def _words(conversation: Conversation) -> str:
    return conversation if isinstance(conversation, str) else "\n".join(text for _, text in conversation)


def _renamed(conversation: Conversation, old: str, new: str) -> Conversation:
    if isinstance(conversation, str):
        return conversation.replace(old, new)
    return tuple((role, text.replace(old, new)) for role, text in conversation)


def _steered(trainer: Any, dataset: Any, i: int, prefix: str, name: str | None = None) -> list[int]:
    query = dataset.rows[i]
    subject = name or query.subject
    instruction = fill_prefix(prefix, subject, query.name)
    conversation = _renamed(query.conversation, query.subject, subject) if name else query.conversation
    return trainer.renderer.encode(conversation, instruction)


def stranger(tokenizer: Any, prompt: list[int], answer: list[int], old: str, new: str) -> Stranger:
    """`answer` with the tokens of the name `old` replaced by those of `new`.

    `places[j]` is the position of the new answer at which the j-th token of the old one is predicted, and `swaps` says
    which ids change places in a distribution. Where the names have different numbers of tokens, what is left over of
    the longer one lines up with the last token of the shorter.
    """
    forms = []
    for space in ("", " "):  # a name at the start of a text, and one inside it, may be different tokens
        ids = [tokenizer(space + name, add_special_tokens=False)["input_ids"] for name in (old, new)]
        if ids[0] and ids[1] and ids not in forms:
            forms.append(ids)
    swaps: dict[int, int] = {}
    for before, after in forms:
        for a, b in zip(before, after, strict=False):
            if a != b and a not in swaps and b not in swaps:
                swaps |= {a: b, b: a}
    renamed: list[int] = []
    places: list[int] = []
    j = 0
    while j < len(answer):
        match = next(((a, b) for a, b in forms if answer[j : j + len(a)] == a), None)
        before, after = match or ([answer[j]], [answer[j]])
        places += [len(renamed) + min(o, len(after) - 1) for o in range(len(before))]
        renamed += after
        j += len(before)
    return Stranger(prompt, renamed, places, swaps)


# -- mixtures ---------------------------------------------------------------------------------------------------------


def _mixture(trainer: Any, dataset: Any, i: int, names: list[str], answer: list[int], steered: bool) -> TopK:
    args, query = trainer.args, dataset.rows[i]
    rows = []
    for which, name in enumerate(names):
        if steered:
            prefix = args.steering_prefixes[which % len(args.steering_prefixes)]
            prompt = _steered(trainer, dataset, i, prefix, name)
        else:
            prompt = trainer.renderer.encode(_renamed(query.conversation, query.subject, name))
        rows.append(stranger(trainer.processing_class, prompt, answer, query.subject, name))
    if not names:
        prompt = _steered(trainer, dataset, i, args.steering_prefixes[0])
        rows = [Stranger(prompt, answer, list(range(len(answer))), {})]

    def mix(model):
        hidden, head = trainer.states_of(model, [row.prompt for row in rows], [row.answer for row in rows])
        starts = accumulate((len(row.answer) for row in rows), initial=0)
        places = [[start + place for place in row.places] for start, row in zip(starts, rows, strict=False)]
        aligned = hidden[torch.tensor(places, device=hidden.device)]
        labels = torch.tensor(answer, device=hidden.device)
        return mixture_topk(aligned, head, [row.swaps for row in rows], labels, args.k, args.impl)

    return trainer.ask_teacher(mix)


def mixture_topk(
    hidden: Tensor, head: LMHead, swaps: list[dict[int, int]], labels: Tensor, k: int, impl: Impl = "auto"
) -> TopK:
    """The mean of several distributions, each with some ids swapped: p(v) = mean_m p_m(swap_m(v)).

    Args:
        hidden: `[M, P, D]` hidden states of M variants at the same P positions.
        head: their LM head.
        swaps: M involutions on ids, as dicts; ids that are not in them stay.
        labels: `[P]` ids that must be among the k.
        k: how many ids are kept: those with the most mass among the variants' own k largest.

    Returns:
        TopK `[P, k]` whose values and tail are log-probabilities.
    """
    variants = hidden.shape[0]
    top = linear_topk(hidden, head, k, impl=impl)
    candidates = torch.stack([_swap(ids, swap) for ids, swap in zip(top.indices, swaps, strict=True)])
    mass = (top.values - top.logsumexp.unsqueeze(-1)).exp()
    candidates, mass = (x.transpose(0, 1).flatten(1) for x in (candidates, mass))  # [P, M k]
    same = candidates.unsqueeze(-1) == candidates.unsqueeze(-2)
    total = (
        torch.where(same, mass.unsqueeze(-2), 0).sum(-1).masked_fill(candidates == labels[:, None], torch.inf)
    )
    total = total.masked_fill(same.tril(-1).any(-1), -1)  # each id once
    ids = candidates.gather(-1, total.topk(k).indices)
    missing = ~(ids == labels[:, None]).any(-1)
    ids[:, -1] = torch.where(missing, labels, ids[:, -1])

    swapped = torch.stack([_swap(ids, swap) for swap in swaps])
    values = linear_gather(hidden, head, swapped, impl=impl)
    tail = linear_logsumexp(hidden, head, exclude=swapped, impl=impl)
    norm = torch.logaddexp(values.logsumexp(-1), tail)
    values = (values - norm.unsqueeze(-1)).logsumexp(0) - math.log(variants)
    tail = (tail - norm).logsumexp(0) - math.log(variants)
    values, order = values.sort(-1, descending=True)
    return TopK(values, ids.gather(-1, order), tail)


def _swap(ids: Tensor, swap: dict[int, int]) -> Tensor:
    out = ids
    for old, new in swap.items():
        out = out.where(ids != old, new)
    return out
