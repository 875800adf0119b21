"""On-policy reverse KL, exactly and cheaply: what each loss makes of the gradient, and what is learned. `python -m benchmarks.studies.onpolicy`.

    teacher: the base of the tiny world    student: the same with noise in its weights, which is to be repaired

    student  --draws answers-->  tokens  --student and teacher read them-->  hidden states  --a loss-->  gradient of all weights

The gradients of every loss are made of the same answers, R times. With g of one loss, d of the exact one (reverse KL over the whole
vocabulary, mean over the tokens), and means over the R batches:

    bias      |mean(g) - mean(d)| / |mean(d)|, without what the finite R adds: tr Cov(g - d) / R is taken off its square
    noise     sqrt(tr Cov(g)) / |mean(d)|, of one batch
    cosine    of mean(g) and mean(d)

Then the student is trained with each loss, for equally many steps on answers of its own. A job is one seed. Rows are appended to
results.jsonl; the page is written from them.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.studies.runner import made_with, rows_of_seeds, run_seeds
from duet.data.prompts import PromptRenderer
from duet.demo.checkpoint import load_base, load_world
from duet.demo.facts import Question
from duet.demo.probes import MAX_NEW_TOKENS, Speaker
from duet.demo.scorecard import some
from duet.demo.workplace import one_thread
from duet.model.answers import generate_answers
from duet_kernels import LMHead, linear_cross_entropy, linear_distill_loss

OUT, PAGE = Path("benchmarks/results/onpolicy"), "onpolicy.md"
SEEDS, ROLLOUTS, STEPS = (0, 1, 2), 48, 100
K, NOISE, RATE, QUESTIONS, ASKED = 8, 0.6, 3e-4, 32, 100
Row = dict[str, Any]


class Batch(NamedTuple):
    """N drawn tokens, and the hidden states of student and teacher from which each was predicted."""

    hidden: Tensor
    head: LMHead
    teacher_hidden: Tensor
    teacher_head: LMHead
    tokens: Tensor


def top_k(normalization: str, support: str) -> Callable[[Batch], Tensor]:
    def loss(batch: Batch) -> Tensor:
        options: dict[str, Any] = {"k": K, "support": support, "normalization": normalization}
        return linear_distill_loss(*batch[:4], divergence="reverse_kl", **options)

    return loss


def exact(batch: Batch) -> Tensor:
    return linear_distill_loss(*batch[:4], divergence="reverse_kl")


def sampled(batch: Batch) -> Tensor:
    """log q(y) times the constant log q(y) - log p(y): its gradient has that of the reverse KL as its mean."""
    log_q = -linear_cross_entropy(batch.hidden, batch.head, batch.tokens, reduction="none")
    log_p = -linear_cross_entropy(batch.teacher_hidden, batch.teacher_head, batch.tokens, reduction="none")
    return (log_q * (log_q.detach() - log_p)).mean()


class Arm(NamedTuple):
    label: str
    loss: Callable[[Batch], Tensor]


ARMS = {
    "exact": Arm("the whole vocabulary", exact),
    "sampled": Arm("the drawn token alone", sampled),
    "teacher": Arm("teacher's k, `renormalize`", top_k("renormalize", "teacher")),
    "student": Arm("student's k, `renormalize`", top_k("renormalize", "student")),
    "teacher_tail": Arm("teacher's k, `tail`", top_k("tail", "teacher")),
    "student_tail": Arm("student's k, `tail`", top_k("tail", "student")),
    "student_truncated": Arm("student's k, `truncated`", top_k("truncated", "student")),
    "student_generalized": Arm("student's k, `generalized`", top_k("generalized", "student")),
}


class Pair:
    """A teacher and a damaged copy of it, and the questions that they are asked."""

    def __init__(self, seed: int) -> None:
        self.teacher, self.tokenizer = load_base()
        world = load_world()
        self.questions = world.questions(world.retain, "train")
        self.held: list[Question] = some(world.questions(world.retain, "report"), ASKED)
        self.renderer, self.seed = PromptRenderer(self.tokenizer), seed
        self.damaged = copy.deepcopy(self.teacher)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.damaged.parameters():
                if parameter.dim() == 2:
                    parameter += NOISE * parameter.std() * torch.randn(parameter.shape, generator=generator)

    def rollout(self, student: Any, questions: Sequence[Question], seed: int) -> Batch:
        """What the student draws, as both read it; the student's hidden states are differentiable."""
        prompts = [list(self.renderer.encode((("user", question.text),))) for question in questions]
        pad = self.tokenizer.pad_token_id
        with torch.no_grad():
            answers = generate_answers(student, prompts, self.tokenizer, pad, MAX_NEW_TOKENS, seed)
        texts = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad)
        place = torch.arange(ids.shape[1])
        first, end = (torch.tensor([len(each) for each in which])[:, None] for which in (prompts, texts))
        drawn = (place >= first) & (place < end)
        before = drawn.roll(-1, 1)  # a token is predicted at the position before it
        mask = (place < end).long()
        hidden = student.model(input_ids=ids, attention_mask=mask).last_hidden_state[before]
        with torch.no_grad():
            taught = self.teacher.model(input_ids=ids, attention_mask=mask).last_hidden_state[before]
        return Batch(hidden, LMHead.of(student), taught, LMHead.of(self.teacher), ids[drawn])

    def drawn_questions(self, number: int) -> list[Question]:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        chosen = torch.randperm(len(self.questions), generator=generator)[:QUESTIONS].tolist()
        return [self.questions[i] for i in chosen]

    def measured(self, student: Any) -> dict[str, float]:
        """The exact reverse KL of answers that the student draws to held-out wordings, and recall of its greedy answers."""
        with torch.no_grad():
            value = float(exact(self.rollout(student, self.held, 1)))
        recall = Speaker(student, self.tokenizer).recall(self.held)
        return {"reverse_kl": round(value, 5), "recall": round(recall, 4)}


class Sums:
    """Running sums over batches of a loss's gradients g and of their distances g - d to the exact ones."""

    def __init__(self) -> None:
        self.mean, self.gap = torch.zeros(()), torch.zeros(())
        self.square = self.gap_square = 0.0

    def add(self, g: Tensor, d: Tensor) -> None:
        self.mean, self.gap = self.mean + g, self.gap + (g - d)
        self.square += float(g.square().sum())
        self.gap_square += float((g - d).square().sum())

    def compared(self, exact: Tensor, count: int) -> dict[str, float]:
        """Bias, noise and cosine; `exact` is the mean of the exact gradients."""
        mean, gap = self.mean / count, self.gap / count
        size, bias = float(exact.norm()), float(gap.square().sum())
        spread = (self.gap_square / count - bias) * count / (count - 1)  # tr Cov(g - d)
        noise = (self.square / count - float(mean.square().sum())) * count / (count - 1)
        cosine = float(mean @ exact) / (float(mean.norm()) * size)
        return {
            "bias": round(math.sqrt(max(bias - spread / count, 0.0)) / size, 4),
            "noise": round(math.sqrt(max(noise, 0.0)) / size, 4),
            "cosine": round(cosine, 4),
        }


def gradients(pair: Pair, rollouts: int) -> dict[str, dict[str, float]]:
    """Arm -> bias, noise and cosine of its gradient in all weights of the damaged student."""
    student = pair.damaged
    parameters, sums = list(student.parameters()), {name: Sums() for name in ARMS}
    for number in range(rollouts):
        batch = pair.rollout(student, pair.drawn_questions(number), number)
        made: dict[str, Tensor] = {}
        for name, arm in ARMS.items():
            parts = torch.autograd.grad(arm.loss(batch), parameters, retain_graph=True)
            made[name] = torch.cat([part.flatten() for part in parts])
            sums[name].add(made[name], made["exact"])
    mean = sums["exact"].mean / rollouts
    return {name: each.compared(mean, rollouts) for name, each in sums.items()}


def trained(pair: Pair, arm: Arm, steps: int) -> dict[str, float]:
    """What a damaged student is after so many steps on answers of its own; every arm gets the same questions."""
    student = copy.deepcopy(pair.damaged)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        arm.loss(pair.rollout(student, pair.drawn_questions(step), step)).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return pair.measured(student)


def run_seed(seed: int, rollouts: int = ROLLOUTS, steps: int = STEPS) -> Row:
    began = time.process_time()
    with one_thread():
        pair = Pair(seed)
        found = {
            "teacher": pair.measured(pair.teacher),
            "damaged": pair.measured(pair.damaged),
            "gradients": gradients(pair, rollouts),
            "trained": {name: trained(pair, arm, steps) for name, arm in ARMS.items()},
        }
    seconds = round(time.process_time() - began, 1)
    return {"seed": seed, "rollouts": rollouts, "steps": steps, **found, "cpu_seconds": seconds}


# -- the page ------------------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float], digits: int = 2) -> str:
    """Mean over seeds, and the smallest and largest where they differ."""
    shown = [f"{value:.{digits}f}" for value in (sum(values) / len(values), min(values), max(values))]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]} to {shown[2]})"


def page(rows: Sequence[Row]) -> str:
    """onpolicy.md from the rows.

    Raises:
        ValueError: there is no row.
    """
    rows, made = sorted(rows, key=lambda row: row["seed"]), made_with(rows)
    numbers = sorted({(row["rollouts"], row["steps"]) for row in rows})

    def learned(label: str, found: Sequence[dict[str, float]]) -> list[str]:
        recall = _mean([100 * each["recall"] for each in found], 0)
        return [label, _mean([each["reverse_kl"] for each in found], 3), recall]

    table = [
        [*learned("the teacher", [row["teacher"] for row in rows]), "–", "–", "–"],
        [*learned("the damaged student", [row["damaged"] for row in rows]), "–", "–", "–"],
    ]
    for name, arm in ARMS.items():
        after = learned(arm.label, [row["trained"][name] for row in rows])
        of = [row["gradients"][name] for row in rows]
        table.append([*after, *(_mean([each[key] for each in of]) for key in ("bias", "noise", "cosine"))])
    said = "; ".join(f"{rollouts} batches for the gradients, {steps} steps" for rollouts, steps in numbers)
    return "\n".join(
        [
            "# On-policy reverse KL: which loss, and what it leaves of the gradient",
            "",
            "Written by `python -m benchmarks.studies.onpolicy --report` from `results.jsonl`; without `--report` it runs what is missing.",
            f"{len(rows)} seeds; k = {K}; {QUESTIONS} questions a batch; {said}; AdamW, learning rate {RATE}; {made}.",
            "",
            f"The student is the tiny world's base with noise of {NOISE} standard deviations in every weight matrix; the teacher is the base. The "
            "student answers questions by drawing, both read the answers, and the loss compares them at every drawn token. "
            "*Reverse KL*: the exact one, in nats per token, of answers drawn to wordings that no training saw; lower is better. "
            "*Recall*: percent of its greedy answers that hold the true value; higher is better. Of the gradient in all weights, "
            "before any training: *bias* and *noise* of one batch in parts of the length of the exact gradient, and the *cosine* between the mean "
            "gradient and the exact one. Cells: mean over seeds (lowest to highest).",
            "",
            "| loss | reverse KL ↓ | recall ↑ | bias ↓ | noise ↓ | cosine ↑ |",
            "|---|---:|---:|---:|---:|---:|",
            *(f"| {' | '.join(cells)} |" for cells in table),
            "",
            "## What it says",
            "",
            *verdicts(rows),
            "",
            "One world and one tiny model of 643 ids: 8 of them are a larger part than of a large vocabulary.",
            "",
        ]
    )


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the rows say, by rule, for the means over seeds."""

    def mean(part: str, name: str, key: str) -> float:
        return sum(row[part][name][key] for row in rows) / len(rows)

    cheap = [name for name in ARMS if name != "exact"]
    value = {name: mean("trained", name, "reverse_kl") for name in ARMS}
    bias = {name: mean("gradients", name, "bias") for name in ARMS}
    noise = {name: mean("gradients", name, "noise") for name in ARMS}
    order = sorted(ARMS, key=lambda name: value[name])
    least, most = (pick(cheap, key=lambda name: bias[name]) for pick in (min, max))
    loudest = max(ARMS, key=lambda name: noise[name])
    return [
        f"* Reverse KL after training, the lowest first: {'; '.join(f'{ARMS[n].label} ({value[n]:.3f})' for n in order)}.",
        f"* Least bias: {ARMS[least].label} ({bias[least]:.2f}); most: {ARMS[most].label} ({bias[most]:.2f}).",
        f"* Most noise: {ARMS[loudest].label}, {noise[loudest] / noise['exact']:.1f} times that of the exact loss.",
    ]


# -- running -------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="only write the page")
    chosen = parser.parse_args()
    if not chosen.report:
        ended = run_seeds(chosen.seeds, chosen.out, run_seed)
        if ended.failed:
            raise SystemExit("; ".join(ended.failed))
    (chosen.out / PAGE).write_text(page(list(rows_of_seeds(chosen.out).values())))
    print(chosen.out / PAGE)


if __name__ == "__main__":
    main()
