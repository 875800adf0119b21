"""`adapter_directions: contrast`: a LoRA that reads its layer's input only where forget rows differ from retain rows.

    y = W x + (alpha / r) B A x        the rows of A are chosen before the first step and stay; only B is trained
    rows of A: the r directions a with the largest   (a' C_f a) / (a' (C_r + lambda I) a)
    C_f, C_r = mean of x x' over the tokens of forget rows, of retain rows
    lambda = the median eigenvalue of C_r; with fewer tokens than D some eigenvalues are only rounding, and these do not count

x is the layer's input in the untrained model. What both kinds of rows have in common (the chat template, the wording of a question)
gives a small A x: whatever B becomes, it changes little there. Each a has the length at which a' C_f a is what PEFT's drawn A
gives on average, tr(C_f) / 3 D; at most 20.

Cost before training: for every layer two eigendecompositions of D x D matrices, O(D^3), and two such matrices in memory. So many
layers are taken at a time that their matrices fit into 1 GiB; each time there is a forward pass of the forget rows, six uses of each,
and of the retain rows, once. All is fp64: beside a few very large activations fp32 sums would round small eigenvalues away.
After the null spaces of what is to be kept (AlphaEdit, arXiv 2410.02355), which do not look at what is to be changed.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.dataset import Draw
from ..model.adapters import adapter_layers
from ..model.loading import is_sharded
from ..model.switches import evaluating
from .asking import Asking

_USES = 6  # of each forget row: what is drawn for it differs
_LONGEST = 20.0
_MOST_BYTES = 1 << 30


@dataclass
class DirectionOptions:
    """Options of a LoRA adapter.

    Attributes:
        adapter_directions: `drawn`: A is drawn and trained, as PEFT does. `contrast`: the rows of A are the directions in which
            what forget rows put into the layer differs most from what retain rows do; they stay, and B alone is trained.
    """

    adapter_directions: Literal["drawn", "contrast"] = "drawn"


def contrast(forget: Tensor, retain: Tensor, count: int) -> Tensor:
    """`[count, D]` directions that forget inputs have and retain inputs have not, the strongest last.

    Args:
        forget, retain: `[D, D]` means of x x', fp64.

    Example:
        >>> forget, retain = (torch.tensor(each).double().diag() for each in ([4, 9, 1], [4, 1, 1]))
        >>> contrast(forget, retain, 1).abs()
        tensor([[0.0000, 0.4157, 0.0000]], dtype=torch.float64)
    """
    size = len(forget)
    ascending = torch.linalg.eigvalsh(retain)
    # No true eigenvalue of a sum of squares is negative: the lowest one shows how large the rounding is.
    rounding = torch.maximum(-2 * ascending[0], torch.finfo(ascending.dtype).eps * size * ascending[-1])
    kept = ascending[ascending > rounding]
    ridge = kept[len(kept) // 2]  # the median
    root = torch.linalg.cholesky(retain + ridge * torch.eye(size, dtype=ridge.dtype, device=ridge.device))
    whitened = torch.linalg.solve_triangular(root, forget, upper=False)
    whitened = torch.linalg.solve_triangular(root, whitened.T, upper=False)
    best = torch.linalg.eigh((whitened + whitened.T) / 2).eigenvectors[:, -count:]
    rows = nn.functional.normalize(torch.linalg.solve_triangular(root.T, best, upper=True).T)
    mean_square = ((rows @ forget) * rows).sum(1)
    length = (forget.trace() / (3 * size) / mean_square).sqrt().clamp(max=_LONGEST)
    return length[:, None] * rows


class FixedDirections(Asking):
    """The part of `DuetTrainer` that chooses where a LoRA reads, before the first step."""

    _placed = False

    def check_directions(self) -> None:
        """Refuses `contrast` where there is no new LoRA of linear layers, nothing to compare, or a sharded model."""
        if self.args.adapter_directions == "drawn":
            return
        named = "adapter_directions: wanted 'drawn', got 'contrast'"
        if is_sharded(self.args):
            raise ValueError(f"{named}, because FSDP and DeepSpeed shard the model")
        loras = self._loras()
        if not loras:
            raise ValueError(f"{named}, because no LoRA of linear layers is trained; give `peft_config`")
        if any(up.weight.any() for _, up in loras):  # once, before training
            raise ValueError(
                f"{named}, because the LoRA changes the model already, and another A would change it again; give a new one as `peft_config`"
            )
        if not self.train_dataset.num_retain:
            raise ValueError(
                f"{named}, because there are no retain rows to differ from; give `retain_dataset`"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; the directions are chosen first, also where a checkpoint, which has them too, is loaded next."""
        if self.args.adapter_directions == "contrast" and not self._placed:
            self._placed = True
            self.prepare_rows(self.train_dataset)
            for downs in self._groups():
                self._place(downs)
        return super().train(*args, **kwargs)

    def _loras(self) -> list[tuple[nn.Linear, nn.Linear]]:
        """A and B of every linear layer with a trained LoRA."""
        student = self.accelerator.unwrap_model(self.model)
        layers = [layer for layer in adapter_layers(student) if hasattr(layer, "lora_A")]
        named = [(layer, name) for layer in layers for name in layer.active_adapters if name in layer.lora_A]
        pairs = [(layer.lora_A[name], layer.lora_B[name]) for layer, name in named]
        return [pair for pair in pairs if isinstance(pair[0], nn.Linear) and pair[0].weight.requires_grad]

    def _groups(self) -> Iterator[list[nn.Linear]]:
        """All A, as many at a time as their matrices fit into `_MOST_BYTES`."""
        group: list[nn.Linear] = []
        size = 0
        for down, _ in self._loras():
            more = 16 * down.in_features**2
            if group and size + more > _MOST_BYTES:
                yield group
                group, size = [], 0
            group.append(down)
            size += more
        yield group

    def _place(self, downs: Sequence[nn.Linear]) -> None:
        rng, dataset = random.Random(f"{self.args.seed}/directions"), self.train_dataset
        of_forget = [Draw(i, rng.getrandbits(62)) for i in range(dataset.num_forget) for _ in range(_USES)]
        of_retain = [Draw(i, rng.getrandbits(62)) for i in range(dataset.num_forget, len(dataset))]
        forget, retain = (self._mean_squares(downs, draws) for draws in (of_forget, of_retain))
        for down, on_forget, on_retain in zip(downs, forget, retain, strict=True):
            if not (on_forget.any() and on_retain.any()):  # once a layer, before training
                raise ValueError(
                    "adapter_directions: wanted 'drawn', got 'contrast', because the rows do not reach every layer with a LoRA, as in a "
                    "mixture of experts"
                )
            with torch.no_grad():
                down.weight.copy_(contrast(on_forget, on_retain, down.out_features))
            down.weight.requires_grad_(False)

    @torch.no_grad()
    def _mean_squares(self, downs: Sequence[nn.Linear], draws: Sequence[Draw]) -> list[Tensor]:
        """The mean of x x' over the tokens of these rows, for the input x of each A."""
        sums = [
            down.weight.new_zeros(down.in_features, down.in_features, dtype=torch.float64) for down in downs
        ]
        items, count = [self.train_dataset[draw] for draw in draws], 0
        student = self.accelerator.unwrap_model(self.model)
        shown: list[Tensor] = []  # which places of the batch are no padding

        def add(which: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)[shown[-1]].double()
            sums[which].addmm_(x.T, x)

        with evaluating(student), ExitStack() as stack:
            for which, down in enumerate(downs):
                stack.callback(down.register_forward_pre_hook(partial(add, which)).remove)
            lengths = (len(item["student"]) for item in items)
            for rows in self.batches(lengths, "where forget and retain rows differ"):
                batch = self._prepare_inputs(self.data_collator([items[i] for i in rows]))
                ids = batch["input_ids"]
                shown.append(batch.get("attention_mask", torch.ones_like(ids)).flatten().bool())
                self.head_inputs(student, batch)
                count += int(shown.pop().sum())
        return [each / count for each in sums]
