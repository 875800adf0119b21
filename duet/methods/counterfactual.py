"""Targets of `duet_deep`, made with the frozen base before training: its own answers, and answers about unknown names.

    y           the base's greedy answer to the plain query; no answer of the dataset is read
    p_cf        the name n is replaced in query and answer by names that the base does not know; the base is run; the
                probability of n's tokens and of theirs is swapped back; the mean over the names
    p_ref       the same behind a steering prefix (which names the stranger too), along the refusal r: the steered base's
                own greedy answer. With `deep_refusals` r is such a text, and p_ref is certain of its next token
    recovery    r behind the first tokens of y, once for every number of them: the answer has begun, and refuses all the same
    stop        r's first token behind the first tokens of y, for every number of them in one pass (`later_target: refusal`)

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
from torch import Tensor, nn
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
    args, everybody = trainer.args, range(len(dataset.rows))
    forget, retain = everybody[: dataset.num_forget], everybody[dataset.num_forget :]
    rows = [_ForgetRow(trainer, dataset.rows[i], i) for i in forget]
    nameless = [row.query.name for row in rows if not row.names]
    if nameless:
        logger.warning(
            f"{nameless[0]}: its question does not hold the subject, so that 'duet_deep' cannot ask about unknown names in its "
            f"place; the steered base stands in for them ({len(nameless)} of {len(forget)} forget rows)"
        )
    own = trainer.teacher_says([dataset.prompt(i) for i in everybody], args.max_answer_tokens)
    if args.deep_refusals:
        refusals = [row.given_refusal() for row in rows]
    else:
        steered = [row.prompt(args.steering_prefixes[0]) for row in rows]
        refusals = trainer.teacher_says(steered, args.max_answer_tokens)

    for batch in trainer.batches((len(dataset.prompt(i)) for i in retain), "what is to be kept"):
        kept = [retain[n] for n in batch]
        segments = _own_answers(trainer, [dataset.prompt(i) for i in kept], [own[i] for i in kept])
        for i, segment in zip(kept, segments, strict=True):
            dataset.keep(i, [segment])
    for i in trainer.progress(forget, "what the base knows"):
        row = rows[i]
        ignorant = row.mixture(own[i], steered=False)
        if args.deep_refusals:
            opening = refusing = certain(refusals[i], args.k, ignorant.values)
            floor = ignorant
        else:
            opening = floor = row.mixture(own[i][:1], steered=True)
            refusing = row.mixture(refusals[i], steered=True)
        share = args.refusal_fraction if _says(refusing, refusals[i]) else 0.0
        late = share * args.recovery_fraction if len(own[i]) > 1 else 0.0
        stops = args.later_target == "refusal"
        refusal = row.given_refusal(begun=True) if stops or late > 0 else []
        later = certain(refusal[:1] * len(own[i]), args.k, ignorant.values) if stops else ignorant
        pushed = row.pushed(dataset.prompt(i), own[i], ignorant, opening, later, floor)
        segments = [pushed._replace(share=1 - share), Segment(refusals[i], _targets(refusing), share - late)]
        if late > 0:
            targets = _targets(certain(refusal, args.k, ignorant.values))
            cuts = range(1, len(own[i]))  # behind the first 1, 2, ... tokens of the base's own answer
            segments += [Segment(refusal, targets, late / len(cuts), own[i][:cut]) for cut in cuts]
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


# -- a forget row -----------------------------------------------------------------------------------------------------


class _ForgetRow:
    """Row i, and what the base says when its subject is replaced by `names`: none where the question does not hold it."""

    def __init__(self, trainer: Any, query: Any, i: int):
        self.trainer, self.args, self.query, self.i = trainer, trainer.args, query, i
        turns = query.conversation
        words = turns if isinstance(turns, str) else "\n".join(text for _, text in turns)
        self.names: list[str] = []
        if query.subject and query.subject in words:
            names = [name for name in self.args.counterfactual_names if name != query.subject]
            count = min(self.args.num_counterfactuals, len(names))
            self.names = random.Random(f"{self.args.seed}/{i}").sample(names, count)

    def prompt(self, prefix: str | None, name: str | None = None) -> list[int]:
        """The prompt behind a steering prefix, if one is given; with another name, if one is given."""
        query = self.query
        conversation = _renamed(query.conversation, query.subject, name) if name else query.conversation
        instruction = None if prefix is None else fill_prefix(prefix, name or query.subject, query.name)
        return self.trainer.renderer.encode(conversation, instruction)

    def given_refusal(self, begun: bool = False) -> list[int]:
        """The text of `deep_refusals` that the row is taught; `begun`: as it follows an answer that has begun."""
        text = random.Random(f"{self.args.seed}/refusal/{self.i}").choice(self.args.deep_refusals)
        text = fill_prefix(text, self.query.subject, self.query.name, "refusal of deep_refusals")
        renderer, most = self.trainer.renderer, self.args.max_answer_tokens
        encode = renderer.encode_rest if begun else renderer.encode_answer
        ids = encode(self.query.conversation, text)
        if len(ids) > most:
            raise ValueError(
                f"deep_refusals: {text!r} has {len(ids)} tokens, more than max_answer_tokens = {most}; wanted a "
                "shorter text: what is cut would be taught as a broken refusal"
            )
        return ids

    def mixture(self, answer: list[int], steered: bool) -> TopK:
        """The mean of what the base says along `answer` of the strangers; of the subject behind the prefix, where there are none."""
        prefixes = self.args.steering_prefixes
        rows = []
        for which, name in enumerate(self.names):
            prompt = self.prompt(prefixes[which % len(prefixes)] if steered else None, name)
            rows.append(stranger(self.trainer.processing_class, prompt, answer, self.query.subject, name))
        if not rows:
            rows = [Stranger(self.prompt(prefixes[0]), answer, list(range(len(answer))), {})]

        def mix(model: nn.Module) -> TopK:
            prompts, answers = [row.prompt for row in rows], [row.answer for row in rows]
            hidden, head = self.trainer.states_of(model, prompts, answers)
            starts = accumulate(map(len, answers), initial=0)
            places = [[start + at for at in row.places] for start, row in zip(starts, rows, strict=False)]
            aligned = hidden[torch.tensor(places, device=hidden.device)]
            labels = torch.tensor(answer, device=hidden.device)
            swaps = [row.swaps for row in rows]
            return mixture_topk(aligned, head, swaps, labels, self.args.k, self.args.impl)

        return self.trainer.ask_teacher(mix)

    def pushed(
        self, prompt: list[int], answer: list[int], ignorant: TopK, opening: TopK, later: TopK, floor: TopK
    ) -> Segment:
        """The own answer. Its position 0 imitates `opening`, with the floor of `floor`; the others `later`, with that of `ignorant`."""
        labels = torch.tensor(answer, device=ignorant.values.device)

        def log_probabilities(model: nn.Module) -> Tensor:
            hidden, head = self.trainer.states_of(model, [prompt], [answer])
            return -linear_cross_entropy(hidden, head, labels, reduction="none", impl=self.args.impl)

        base = self.trainer.ask_teacher(log_probabilities)
        unknown = log_probability(ignorant, labels)
        known = base.exp() - unknown.exp() > self.args.knowledge_threshold
        floors = torch.cat([log_probability(floor, labels[:1])[:1], unknown[1:]])
        pairs = zip(_parts(opening), _parts(later), strict=True)
        values, indices, tail = (torch.cat([a[:1], b[1:]]) for a, b in pairs)
        others = {"base": base, "floor": floors, "known": known, "pushed": torch.ones_like(known)}
        return Segment(answer, _targets(TopK(values, indices, tail), **others))


# -- strangers --------------------------------------------------------------------------------------------------------


def _renamed(conversation: Conversation, old: str, new: str) -> Conversation:
    if isinstance(conversation, str):
        return conversation.replace(old, new)
    return tuple((role, text.replace(old, new)) for role, text in conversation)


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
