"""What is measured: operations at shapes, inputs with real probability mass, and the least work each could do.

A `Case` is one operation at one shape; `make_inputs` draws its tensors; `floor_ms` is the time of the cheapest work
that an exact result needs, in units of what this machine was measured to do (`harness.Floors`). Knows no provider.

    G = 2 N D V FLOP, one product of logits' size
    linear_topk, linear_token_stats, linear_logsumexp   1 G
    topk_distill_loss                 N K D, the rows of W, read once; a trainable head writes dW. Forms with a tail:
                                      2 G (3 G), logits for the sum and dh (and dW)
    linear_distill_loss               two logits 2 G, dh 1 G, trainable head 1 G
    linear_cross_entropy              logits 1 G, dh 1 G, trainable head 1 G

The floor is what this machine reached, no limit of nature: `FLOOR` says why a measurement can lie below it.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from benchmarks.harness import Floors
from duet_kernels import TopK, linear_gather, linear_logsumexp, linear_topk

OPS = (
    "linear_topk",
    "topk_distill_loss",
    "linear_distill_loss",
    "linear_cross_entropy",
    "linear_token_stats",
    "linear_logsumexp",
)
LOSSES = OPS[1:4]
PASSES = ("forward", "full")
DIVERGENCES = {
    "topk_distill_loss": ("huber", "forward_kl", "forward_kl/tail"),
    "linear_distill_loss": ("forward_kl", "jsd", "symmetric_kl"),
    "linear_logsumexp": ("", "exclude"),  # "exclude": without the teacher's k ids
}
# Which ids the teacher's slots hold: its own likeliest, or ids as frequent as words are.
IDS = ("likeliest", "zipf")
LOGIT_STD = 3.0
FLOOR = (
    "Share of the floor: the time of the work that an exact result needs, over the time taken. The work is counted in "
    "products of logits' size or, where a loss needs the k logits alone, in bytes: the k rows of W, read once for each token, "
    "dW written once. The speed is that of the library's product and of a copy, measured in the same run. So the floor is a yardstick, "
    "no limit, and a share above 100 % is possible: another way of multiplying can beat the library's product at that shape; "
    "a copy also writes, and reading alone is faster; rows of W that several tokens ask for come out of a cache; and both "
    "times scatter."
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape. `divergence` may carry a normalization: "forward_kl/tail"."""

    op: str
    n: int
    d: int
    v: int
    k: int = 64
    dtype: torch.dtype = torch.float32
    divergence: str = ""
    trainable: bool = False  # the head asks for its gradient
    ids: str = "likeliest"

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op: wanted one of {', '.join(OPS)}, got {self.op!r}")
        wanted = DIVERGENCES.get(self.op, ("",))
        if self.divergence not in wanted:
            raise ValueError(f"divergence of {self.op}: wanted one of {wanted}, got {self.divergence!r}")
        if self.ids not in IDS:
            raise ValueError(f"ids: wanted one of {', '.join(IDS)}, got {self.ids!r}")
        if self.ids == "zipf" and self.has_tail:
            raise ValueError(
                "ids: zipf ids hold hardly any probability, and a loss with a tail is nearly 0 there"
            )

    @property
    def has_gradient(self) -> bool:
        return self.op in LOSSES

    @property
    def has_tail(self) -> bool:
        return self.divergence.endswith("/tail")

    @property
    def head(self) -> str:
        return ("trainable" if self.trainable else "frozen") if self.has_gradient else "none"

    @property
    def passes(self) -> tuple[str, ...]:
        """A backward alone is not measured: half of the providers compute their gradient in the forward pass."""
        return PASSES if self.has_gradient else PASSES[:1]

    def small(self) -> Case:
        """The same kind of case at a size at which fp64 is quick: what the correctness gate looks at.

        As in the large cases k ids are few of the vocabulary: their rows are gathered, and not all logits made.
        """
        return dataclasses.replace(self, n=48, d=128, v=8192, k=min(self.k, 16))


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Student and teacher of one call. Each model has a head of its own; labels have real probability mass."""

    hidden: Tensor  # [N, D], requires grad where the operation is a loss
    weight: Tensor  # [V, D], requires grad where the head is trainable
    teacher_hidden: Tensor  # [N, D]
    teacher_weight: Tensor  # [V, D]
    teacher: TopK  # the teacher's top-k: what a cache would hold
    labels: Tensor  # [N]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight) if x.requires_grad]

    @property
    def num_bytes(self) -> int:
        return self.hidden.nbytes + self.weight.nbytes

    def double(self) -> Inputs:
        """The same numbers in fp64, with leaves of their own."""

        def cast(x: Tensor) -> Tensor:
            return x.detach().double().requires_grad_(x.requires_grad)

        teacher = self.teacher._replace(
            values=self.teacher.values.double(), tail_logsumexp=self.teacher.tail_logsumexp.double()
        )
        return Inputs(
            cast(self.hidden),
            cast(self.weight),
            cast(self.teacher_hidden),
            cast(self.teacher_weight),
            teacher,
            self.labels,
        )


def zipf_ids(n: int, v: int, k: int, generator: torch.Generator) -> Tensor:
    """`[n, k]` ids, different within a row; the r-th most frequent one is drawn with a probability like 1 / r.

    A few ids stand in most rows, and of a large vocabulary about half stand in none: what dW of a sparse loss finds
    where the teacher reads text. The frequencies are shuffled over the vocabulary.
    """
    device = generator.device
    rank = torch.randperm(v, generator=generator, device=device) + 1
    chosen = []
    for start in range(0, n, rows := max(1, 2**27 // v)):
        exponential = torch.empty(min(rows, n - start), v, device=device).exponential_(generator=generator)
        # The k smallest of independent exponential times of rates 1 / r: k draws without replacement.
        chosen.append(exponential.mul_(rank).topk(k, largest=False).indices)
    return torch.cat(chosen)


def topk_at(ids: Tensor, hidden: Tensor, weight: Tensor) -> TopK:
    """The teacher's logits at `ids` in descending order, and the log-sum-exp of all others."""
    values, order = linear_gather(hidden, weight, ids, impl="chunked").sort(-1, descending=True)
    tail = linear_logsumexp(hidden, weight, exclude=ids, impl="chunked")
    return TopK(values, ids.gather(-1, order), tail)


def make_inputs(case: Case, device: torch.device | str, seed: int = 0) -> Inputs:
    """Logits of standard deviation 3; a teacher that mostly agrees; labels among the teacher's likeliest ids."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        drawn = torch.empty(shape, device=device, dtype=torch.float32)
        return drawn.normal_(std=std, generator=generator)

    std = LOGIT_STD / math.sqrt(case.d)
    hidden, weight = draw(case.n, case.d), draw(case.v, case.d, std=std)
    teacher_hidden = (hidden + draw(case.n, case.d, std=0.3)).to(case.dtype)
    if case.op == "linear_distill_loss":
        teacher_weight = (weight + draw(case.v, case.d, std=0.1 * std)).to(case.dtype)
    else:
        teacher_weight = weight.to(case.dtype)
    hidden, weight = hidden.to(case.dtype), weight.to(case.dtype)
    if case.ids == "zipf":
        teacher = topk_at(zipf_ids(case.n, case.v, case.k, generator), teacher_hidden, teacher_weight)
    else:
        teacher = linear_topk(teacher_hidden, teacher_weight, case.k, impl="chunked")
    pick = torch.randint(min(8, case.k), (case.n, 1), device=device, generator=generator)
    labels = teacher.indices.gather(-1, pick)[:, 0]
    hidden.requires_grad_(case.has_gradient)
    weight.requires_grad_(case.has_gradient and case.trainable)
    return Inputs(hidden, weight, teacher_hidden, teacher_weight, teacher, labels)


def floor_ms(case: Case, floors: Floors, which_pass: str) -> float:
    """Time of the work for an exact result, by what this machine was measured to do."""
    size = torch.finfo(case.dtype).bits // 8
    backward = which_pass == "full"
    if case.op == "topk_distill_loss" and not case.has_tail:
        rows = floors.traffic_ms(case.n * case.k * case.d * size)
        dweight = floors.traffic_ms(case.v * case.d * size) if backward and case.trainable else 0.0
        return rows + dweight
    logits = 2 if case.op == "linear_distill_loss" else 1
    gradients = (1 + case.trainable) if backward else 0
    return floors.product_ms * (logits + gradients)
