"""RepSelect (arXiv 2606.17168): one gradient of the forget rows, without what it shares with everything else; then fixed steps.

    1  a LoRA on the MLP matrices learns the forget answers (one pass, plain descent): the attacker who fine-tunes
    2  G = the gradient of -NLL(forget answers) in every MLP matrix W, with that LoRA on (one pass, the mean over batches)
    3  the LoRA is thrown away, and the k largest singular directions of G = U S V^T are collapsed on both sides:
           G <- G - G V (1 - s_k / S) V^T      G <- G - U (1 - s_k / S) U^T G
       so that s_i becomes s_k^2 / s_i among the k largest, and the others stay
    4  every step: W <- W - learning rate G

What many rows have in common has large singular values: it is general, and it is what fine-tuning brings back first. Retain
rows take no part; the paper stops when a divergence on general text is used up, which here is a matter of `max_steps` and
`learning_rate`. After the authors' code (github.com/filyp/open-unlearning, `repselect_simple.py`, July 2026), of which these
are the defaults: rank 8, LoRA rate 0.01, k 512, learning rate 0.05 constant. Ours: batches are averaged, not summed; k is at
most the matrix's smaller side; directions without any gradient are none of the k. No mixture of experts.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..options import Count, NotNegative
from .asking import Asking
from .sharpness import check_plain_steps, trained

_MLP = re.compile(
    r"\b(gate_proj|up_proj|gate_up_proj|down_proj|dense_h_to_4h|dense_4h_to_h|fc1|fc2|fc_in|fc_out)\.weight$"
)
_NOTHING = 1e-6  # of the largest singular value
_SPARE = 16  # directions beside the k: the randomised decomposition is exact enough only with some to spare


@dataclass
class SelectivityOptions:
    """Options of `repselect`.

    Attributes:
        repselect_components: how many singular directions of each gradient are collapsed.
        repselect_rank: of the LoRA that learns the forget answers first.
        repselect_lora_rate: learning rate of the LoRA that learns the forget answers first (0: there is none).
    """

    repselect_components: Count = 512
    repselect_rank: Count = 8
    repselect_lora_rate: NotNegative = 0.01


def mlp_matrices(name: str, args: Any) -> bool:
    """The matrices of the MLPs."""
    return _MLP.search(name) is not None


def check_selective(objective: Any, args: Any) -> None:
    """Refuses options under which the fixed gradient would not be what is stepped along; other objectives are not looked at."""
    if objective.direction is None:
        return
    named = f"because objective {args.objective!r} steps along one gradient, made before training"
    check_plain_steps(args, named)
    if args.optim != "sgd":
        raise ValueError(
            f"optim: wanted 'sgd', got {getattr(args.optim, 'value', args.optim)!r}, {named}: Adam would move every weight by the same amount, whatever "
            "was collapsed. Set optim: sgd, lr_scheduler_type: constant and a learning_rate such as 0.05"
        )


def check_selective_model(objective: Any, model: nn.Module) -> None:
    """Refuses adapters and mixtures of experts."""
    if objective.direction is None:
        return
    if hasattr(model, "peft_config"):
        raise ValueError(
            "peft_config: 'repselect' changes the MLP matrices themselves and wanted a model without an adapter; merge the "
            "adapter first (`duet merge`)"
        )
    if any(".experts." in name for name, _ in model.named_parameters()):
        raise ValueError("model: 'repselect' wanted dense MLPs, got a mixture of experts")


# -- the gradient ---------------------------------------------------------------------------------------------------


def collapsed(gradient: Tensor, components: int) -> Tensor:
    """`[out, in]` the gradient with its largest singular directions collapsed on both sides, in fp32.

    Example:
        >>> collapsed(torch.diag(torch.tensor([4.0, 2.0, 1.0])), 2).diagonal().round(decimals=3)
        tensor([1., 2., 1.])
    """
    gradient = gradient.float()
    left, values, right = torch.svd_lowrank(gradient, q=min(components + _SPARE, *gradient.shape))
    known = min(components, int((values > _NOTHING * values[0]).sum()))  # once a matrix, before training
    if known == 0:
        return gradient
    left, values, right = left[:, :known], values[:known], right[:, :known]
    share = 1 - values[-1] / values
    gradient = gradient - (gradient @ right * share) @ right.T
    return gradient - left @ (share[:, None] * (left.T @ gradient))


def selective_direction(trainer: Any) -> list[Tensor]:
    """The collapsed gradient for every trained matrix, in the order of `named_parameters`.

    Two passes over the forget rows, in batches of the training's size and in an order drawn from `seed`; the random numbers
    of the training itself are those without it.
    """
    args, model = trainer.args, trainer.model
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        model.train()
        with adversary(model, weights, args.repselect_rank) as adapters:
            if args.repselect_lora_rate:
                for loss in _losses(trainer, "an attacker learns the forget rows"):
                    for adapter, slope in zip(adapters, torch.autograd.grad(loss, adapters), strict=True):
                        adapter.data.add_(slope, alpha=args.repselect_lora_rate)  # up: the loss is -NLL
            gradients, count = [torch.zeros_like(p) for p in weights.values()], 0
            for loss in _losses(trainer, "the gradient of the forget rows"):
                count += 1
                for sum_, slope in zip(
                    gradients, torch.autograd.grad(loss, list(weights.values())), strict=True
                ):
                    sum_.add_(slope)
        return [
            collapsed(gradient / count, args.repselect_components).to(gradient.dtype)
            for gradient in gradients
        ]


def _losses(trainer: Any, doing: str) -> Iterator[Tensor]:
    """The loss of every batch of forget rows, one after the other."""
    dataset, size = trainer.train_dataset, trainer.args.train_batch_size
    order = torch.randperm(dataset.num_forget).tolist()
    for start in trainer.progress(range(0, len(order), size), doing):
        items = [dataset[i] for i in order[start : start + size]]
        with trainer.compute_loss_context_manager():
            inputs = trainer._prepare_inputs(trainer.data_collator(items))
            loss = trainer.parts_of(trainer.model, inputs)["loss"]
        yield loss


@contextmanager
def adversary(model: nn.Module, weights: Sequence[str] | dict[str, Any], rank: int) -> Iterator[list[Tensor]]:
    """Inside, every linear layer of these weights adds B A x; A is drawn as PEFT draws it, B is 0. Yields all A and B.

    Raises:
        ValueError: a weight is not that of an `nn.Linear`.
    """
    adapters: list[Tensor] = []
    hooks = []
    for name in weights:
        layer = model.get_submodule(name.removesuffix(".weight"))
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"model: 'repselect' wanted linear MLP layers, got {type(layer).__name__} {name}"
            )
        down = layer.weight.new_empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(down, a=5**0.5)
        up = layer.weight.new_zeros(layer.out_features, rank)
        down.requires_grad_(True)
        up.requires_grad_(True)
        adapters += [down, up]

        def add(layer: Any, inputs: Any, output: Tensor, down: Tensor = down, up: Tensor = up) -> Tensor:
            return output + nn.functional.linear(nn.functional.linear(inputs[0], down), up)

        hooks.append(layer.register_forward_hook(add))
    try:
        yield adapters
    finally:
        for hook in hooks:
            hook.remove()


class FixedSteps(Asking):
    """The part of `DuetTrainer` that steps along one gradient, for objectives that make one; the others pass through."""

    _direction: Sequence[Tensor] = ()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; the gradient is made first, of the untrained model, also where a checkpoint is loaded next."""
        if self.objective.direction is not None and not self._direction:
            self._direction = self.objective.direction(self)
        return super().train(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """`Trainer.training_step`; of such an objective without a backward: the loss is only measured."""
        if self.objective.direction is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(
                model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch
            )
        for parameter, gradient in zip(trained(model), self._direction, strict=True):
            parameter.grad = gradient.clone()  # clipping works in place
        return loss
