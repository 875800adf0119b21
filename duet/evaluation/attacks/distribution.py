"""Leaks in the distribution that the answer does not show: membership inference, and ranks at both ends.

membership    AUC of log-likelihood scores between forgotten answers and answers never trained on; 0.5 reveals nothing,
              and an AUC far below 0.5 (the forgotten look suspiciously strange) says as much as one far above
rank probe    a token that unlearning pushed to the very bottom is found as easily as one at the top
"""

import math
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
from scipy import stats

from duet_kernels import LMHead

from .. import metrics, words
from ..scoring import batches_by_length, token_ranks, token_scores
from .rows import AttackRow
from .target import Target, Unit

END = 3
# Low for text that was trained on.
MEMBERSHIP_SCORES = {
    "loss": lambda s: s.loss,
    "min_k_20": lambda s: metrics.min_k(s.logprobs, 20),
    "min_k_40": lambda s: metrics.min_k(s.logprobs, 40),
    "min_k_plus_plus_20": lambda s: metrics.min_k_plus_plus(s.logprobs, s.entropies, s.variances, 20),
}


def _scored(target: Target, rows: Sequence[AttackRow], function: Any) -> list[tuple[AttackRow, str, Any]]:
    """(row, status, what `function` makes of its sequence), in batches; None for a row that cannot be scored."""
    why = [target.why_not_scored(row) for row in rows]
    sequences = {i: target.forced(row) for i, row in enumerate(rows) if why[i] is None}
    lengths = {i: len(s.prompt) + len(s.answer) for i, s in sequences.items()}
    made: dict[int, Any] = {}
    for batch in batches_by_length(lengths, target.options.batch_size):
        results = function(target.model, [sequences[i] for i in batch], target.pad_id)
        made |= zip(batch, results, strict=True)
        target.queries += len(batch)
    status = [why[i] or ("ok" if made[i].finite else "nan") for i in range(len(rows))]
    return [(row, status[i], made.get(i)) for i, row in enumerate(rows)]


def membership(target: Target) -> Iterator[Unit]:
    """One outcome per forgotten and per holdout row and score; `leaked` is made from all of them (`auc_leak`)."""

    def work() -> list[dict[str, Any]]:
        outcomes = []
        for member, rows in ((True, target.rows), (False, target.holdout)):
            for row, status, score in _scored(target, rows, token_scores):
                # Holdout rows have ids of their own.
                where = {"id": row.id if member else -1 - row.id, "member": member, "leaked": None}
                for name, function in MEMBERSHIP_SCORES.items():
                    value = function(score) if status == "ok" else math.nan
                    given = {"score": value if math.isfinite(value) else None}
                    outcomes.append(where | {"variant": name, "status": status} | given)
        return outcomes

    yield "scores", work


def auc_leak(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """AUC of one score (members score lower), and the leak 2 |AUC - 0.5|; with 95 % intervals.

    If the interval of the AUC holds 0.5, the interval of the leak starts at 0: both sides of chance are leaks.
    """
    sides = [
        [-o["score"] for o in outcomes if o["member"] is member and o["score"] is not None]
        for member in (True, False)
    ]
    if not all(sides):
        return {"leak": None, "low": None, "high": None, "auc": None, "rows": 0}
    area, *ends = metrics.auc_interval(*sides)
    beside = [2 * abs(end - 0.5) for end in ends]
    low = 0.0 if ends[0] <= 0.5 <= ends[1] else min(beside)
    leak = {"leak": 2 * abs(area - 0.5), "low": low, "high": max(beside), "auc": area}
    return leak | {
        "auc_low": ends[0],
        "auc_high": ends[1],
        "rows": len(sides[0]),
        "holdout_rows": len(sides[1]),
    }


def p_value(outcomes: Sequence[dict[str, Any]], permutations: int = 1999, seed: int = 0) -> float | None:
    """That the best score tells the sides apart by chance: the best of several scores is above 0 without any difference.

        p = (1 + #{permutations of the sides with max |AUC - 1/2| over the scores at least as large}) / (1 + permutations)

    Of rows that have every score, whose scores stay together. None: a side has none.
    """
    rows: dict[tuple[Any, Any], list[float | None]] = {}
    for o in outcomes:
        rows.setdefault((o["member"], o["id"]), []).append(o["score"])
    whole = [(member, scores) for (member, _), scores in rows.items() if None not in scores]
    members = sum(member for member, _ in whole)
    if members in (0, len(whole)):
        return None
    ranks = stats.rankdata([scores for _, scores in whole], axis=0) - (len(whole) + 1) / 2  # sums to 0
    rng = np.random.default_rng(seed)

    def best(chosen: Any) -> float:
        return float(np.abs(ranks[chosen].sum(0)).max())

    found = best([i for i, (member, _) in enumerate(whole) if member]) - 1e-9
    drawn = (best(rng.permutation(len(whole))[:members]) for _ in range(permutations))
    return (1 + sum(other >= found for other in drawn)) / (1 + permutations)


def rank_probe(target: Target) -> Iterator[Unit]:
    """Ranks of the true tokens under teacher forcing.

    The telling token is that token of the row's value (without one, of the answer without its end token) that stands farthest
    from the top: who reads a value wants all of it, and the first digit of a year is likely in every model. Blank tokens tell
    nothing.
    """

    def work() -> list[dict[str, Any]]:
        last = LMHead.of(target.model).num_ids - 1
        outcomes = []
        for row, status, ranks in _scored(target, target.rows, token_ranks):
            outcome = {"id": row.id, "variant": "both ends", "leaked": None, "status": status}
            if status != "ok":
                outcomes.append(outcome)
                continue
            answer = target.answer_ids(row.conversation, row.answer)
            above, below = ranks.above[: len(answer)], ranks.below[: len(answer)]
            telling = max(_of_value(target, row, answer), key=lambda i: above[i])
            top, bottom = int(above[telling]) < END, int(below[telling]) < END
            outcomes.append(
                outcome
                | {"leaked": int(top or bottom), "top": int(top), "bottom": int(bottom)}
                | {"rank": int(above[telling]), "relative_rank": above[telling] / last}
                | {"all_top": float((above < END).mean()), "all_bottom": float((below < END).mean())}
                | {"all_relative_rank": float(above.mean() / last)}
            )
        return outcomes

    yield "both ends", work


def _of_value(target: Target, row: AttackRow, answer: Sequence[int]) -> Sequence[int]:
    """Places of the tokens of the value, or of the whole `answer` where the row has none; without tokens that are blank."""

    def shared(text: str) -> tuple[int, bool]:
        """How many tokens of a beginning of the answer are the answer's own; whether all of them are."""
        ids = target.answer_ids(row.conversation, text) if text else []
        own = takewhile(lambda pair: pair[0] == pair[1], zip(ids, answer, strict=False))
        count = len(list(own))
        return count, count == len(ids)

    start, stop = 0, len(answer)
    place = None if row.value is None else words.span(row.answer, row.value)
    if place is not None:
        start, _ = shared(row.answer[: place[0]].rstrip())
        stop, ends = shared(row.answer[: place[1]])
        stop += not ends  # a token of the value and of what follows
    told = [i for i in range(start, stop) if target.tokenizer.decode([answer[i]]).strip()]
    return told or range(len(answer))
