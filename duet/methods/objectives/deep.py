"""`duet_deep`: query-only unlearning that also survives prefilled answers and relearning. Our own contribution.

Per forget query the base's own greedy answer y is a prefilled text on which the student is pulled and pushed at once:

    position 0      KL(p_ref || p_s)                      p_ref: the steered base, which refuses
    positions >= 1  counterfactual_weight KL(p_cf || p_s)  p_cf: the base, had it never met the name
    known tokens    -(2/b) log sigma(-b sum_j g_j log(p_s(y_j) / p_base(y_j)))       masked NPO, b = deep_npo_beta
                    lift_weight sum_j relu(log f_j - log p_s(y_j))                   back up to the floor

A token is known where p_base(y_j) - p_cf(y_j) > knowledge_threshold. Its floor f_j is what p_cf gives it (at position
0: p_ref), and the gate g_j = [log p_s(y_j) > log f_j - 1] ends the push below it: without the floor the forgotten value
stays readable, as the *least* likely one. A share of the forget queries carries the whole refusal instead, KL(p_ref ||
p_s) at all its positions, and retain queries the base's own answers, KL(p_base || p_s). Every KL is over the teacher's
top-k and a bucket for the rest: without the bucket nothing would push a token down that the teacher does not list.

A small model may not refuse behind any prefix. `deep_refusals` are then the refusals: p_ref gives all its mass to the next
token of such a text, and KL(p_ref || p_s) is the cross-entropy of the text. No prefix is read, and f_0 is what p_cf gives.
Of such refusals a share (`recovery_fraction`) follows the first tokens of the base's own answer: an answer that has begun to tell
must still end in a refusal (arXiv 2406.05946 trains recoveries of this kind from harmful answers). But at these positions p_cf asks for
other tokens, and with the default weights its pull is the stronger one. With `later_target: refusal` the positions >= 1 imitate the
first token of the refusal in the place of p_cf: one pass teaches all of them to begin it.

All targets are plain numbers made before training (`duet.methods.counterfactual`).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from duet_kernels import TopK, linear_cross_entropy

from ...options import Count, NotNegative, Positive, Share, SomeTexts, Texts
from .record import CommonOptions, Step, sum_where

GATE_WIDTH = 1.0  # nats under the floor at which the push ends

# Names of nobody, we hope: one that the model knows somebody by must be replaced.
INVENTED_NAMES = (
    "Tavik Orlemond", "Brisa Quenhart", "Odrin Valsace", "Mirelle Thostrup", "Casper Yndlefeld", "Zuleika Barnquist",
    "Perrin Oskelda", "Halvard Minchetti", "Ottoline Drask", "Fenwick Salazny", "Ilka Brombeck", "Joss Trevallion",
    "Nerida Kolbrook", "Anselm Wyrick", "Sunniva Plackett", "Dorrit Hagenau",
)  # fmt: skip


@dataclass
class DeepOptions(CommonOptions):
    """Options of `duet_deep`.

    Attributes:
        counterfactual_names: what is put in the place of a subject to learn how the model speaks of somebody whom it does
            not know; none of them may be known to it.
        num_counterfactuals: how many of them are drawn for each forget row.
        deep_refusals: texts that refuse (`{subject}` is replaced), of which each forget row is taught one, drawn once from `seed`;
            without any, the steered base's own refusals are taught.
        refusal_fraction: share of the forget queries that carry a whole refusal rather than the base's own answer.
        recovery_fraction: share of those refusals that follow the first tokens of the base's own answer, a number of tokens drawn
            at each use. Needs `deep_refusals`: the steered base does not refuse in the middle of an answer.
        knowledge_threshold: an answer token counts as knowledge where the base gives it this much more probability
            than it would for an unknown name.
        counterfactual_weight: factor on the pull at the later positions of the base's own answer.
        later_target: what that pull is towards: `counterfactual`, what the base would say had it never met the name; or `refusal`,
            the first token of the refusal, which withstands forced openings better. `refusal` needs `deep_refusals`; the pull is then
            a sum of many large terms, so that `counterfactual_weight` should be about 0.05.
        deep_npo_beta: beta of the NPO that pushes known tokens down.
        lift_weight: factor on what lifts a pushed token back up to its floor.
    """

    counterfactual_names: SomeTexts = field(default_factory=lambda: list(INVENTED_NAMES))
    num_counterfactuals: Count = 8
    deep_refusals: Texts = field(default_factory=list)
    refusal_fraction: Share = 0.25
    recovery_fraction: Share = 0.0
    knowledge_threshold: Share = 0.3
    counterfactual_weight: NotNegative = 0.3
    later_target: Literal["counterfactual", "refusal"] = "counterfactual"
    deep_npo_beta: Positive = 0.5
    lift_weight: NotNegative = 0.1


def count_deep(inputs: dict[str, Any]) -> Tensor:
    """`[2]` forget queries that carry the base's own answer, and positions of those that carry a refusal."""
    query, forget, pushed = inputs["query"], inputs["forget"], inputs["targets"]["pushed"]
    queries = torch.zeros_like(forget, dtype=torch.int64).index_add(0, query, pushed.long()) > 0
    return torch.stack([queries.sum(), (forget[query] & ~pushed).sum()])


def duet_deep(step: Step) -> dict[str, Tensor]:
    """Pull, counterfactual pull, masked NPO and lift on forget queries; the base's own distributions on the others.

    Means are over queries (sums over their tokens), except that of the refusals, which is over their positions.
    """
    args, targets = step.args, step.targets
    pushed_queries, refusal_positions = step.counts.own
    pushed, first, retain = targets["pushed"], step.is_first, ~step.of_forget
    kl = step.tail_kl(TopK(targets["values"], targets["indices"], targets["tail"]))
    pull = sum_where(pushed & first, kl) / pushed_queries
    counterfactual = sum_where(pushed & ~first, kl) / pushed_queries
    refusal = sum_where(step.of_forget & ~pushed, kl) / refusal_positions
    own_answers = sum_where(retain, kl) / step.counts.retain_queries

    known = targets["known"]
    labels = step.labels.masked_fill(~known, -100)
    log_p = -linear_cross_entropy(step.hidden, step.head, labels, reduction="none", impl=args.impl)
    above = known & (log_p.detach() > targets["floor"] - GATE_WIDTH)
    log_ratio = step.per_query(torch.where(above, log_p - targets["base"], 0))
    beta = args.deep_npo_beta
    npo = -2 / beta * F.logsigmoid(-beta * log_ratio)
    of_pushed = step.per_query(pushed.to(npo.dtype)) > 0
    push = sum_where(of_pushed, npo) / pushed_queries
    lift = sum_where(known, (targets["floor"] - log_p).clamp(min=0)) / pushed_queries

    forget = pull + refusal + args.counterfactual_weight * counterfactual + push + args.lift_weight * lift
    logged = {"pull": pull, "refusal": refusal, "counterfactual": counterfactual, "push": push, "lift": lift}
    return {
        "loss": forget + args.retain_weight * own_answers,
        "forget_loss": forget,
        "retain_loss": own_answers,
        **{f"{name}_loss": value.detach() for name, value in logged.items()},
    }
