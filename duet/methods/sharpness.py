"""Sharpness-aware steps: the forget part's gradient is taken where a small change of the weights raises that part most.

    eps  = rho g / |g|,   g = the gradient of forget(theta), of the whole accumulated step
    step along   grad forget(theta + eps) + retain_weight grad retain(theta),   made at theta

theta are the weights that are trained. Two forwards and three backwards a micro-batch instead of one and one; in memory
beside a plain step: the perturbation and a copy of the weights, as many numbers each as are trained.
Source: arXiv 2502.05374, after SAM (arXiv 2010.01412).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.loading import is_sharded
from .asking import Asking


def check_sharp(objective: Any, args: Any) -> None:
    """Refuses options under which a sharpness-aware step cannot be made; other objectives are not looked at."""
    if not objective.sharp:
        return
    named = f"because objective {args.objective!r} moves the weights within a step"
    check_plain_steps(args, named)
    optim = str(getattr(args.optim, "value", args.optim))
    if any(kind in optim for kind in ("lomo", "layerwise")):
        raise ValueError(f"optim: wanted one that steps after the backward, got {optim!r}, {named}")


def check_plain_steps(args: Any, named: str) -> None:
    """Refuses several processes, sharded models and scaled gradients; `named` says why, in the error."""
    if is_sharded(args) or args.world_size > 1:
        raise ValueError(f"args: wanted one process and a model that is not sharded, {named}")
    if args.fp16:
        raise ValueError(f"fp16: wanted False, got True, {named}: gradients are scaled there; bf16 works")


def check_sharp_weights(objective: Any, model: nn.Module) -> None:
    """Refuses trained weights in half precision: most of a perturbation of length rho would be rounded away."""
    kinds = {str(p.dtype).removeprefix("torch.") for p in trained(model) if p.dtype.itemsize < 4}
    if objective.sharp and kinds:
        raise ValueError(
            f"model: wanted trained weights in float32, got {', '.join(sorted(kinds))}, in which a perturbation of length "
            "sam_rho is rounded away; load it in float32 (model.dtype: float32, and bf16: true for speed), or train an adapter"
        )


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


def perturbation(gradients: Sequence[Tensor | None], rho: float) -> list[Tensor | None]:
    """rho g / |g|, with the norm over all gradients together; 0 where every gradient is 0.

    Example:
        >>> perturbation([torch.tensor([3.0]), None, torch.tensor([4.0])], 0.5)
        [tensor([0.3000]), None, tensor([0.4000])]
    """
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    scale = rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    return [None if g is None else g * scale for g in gradients]


@contextmanager
def moved(weights: Sequence[Tensor], by: Sequence[Tensor | None]) -> Iterator[None]:
    """Inside, the weights are moved; afterwards they are bitwise what they were."""
    kept = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for weight, change in zip(weights, by, strict=True):
            if change is not None:
                weight.add_(change)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


class SharpSteps(Asking):
    """The part of `DuetTrainer` that makes sharpness-aware steps for objectives that want them; the others pass through."""

    _upcoming: Sequence[Any] = ()  # the micro-batches of a step that has not begun
    _change: Sequence[Tensor | None] = ()  # of the weights, in this step
    _at_theta: list[dict[str, Tensor]]  # the parts of each of its micro-batches, before the weights are moved
    _moved = False

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """`Trainer.get_batch_samples`; what it returns is looked at before the step."""
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._upcoming = batches
        return batches, counts

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """`Trainer.training_step`; of a sharpness-aware objective, with the weights moved for the time of it."""
        if not self.objective.sharp:
            return super().training_step(model, inputs, num_items_in_batch)
        weights = trained(model)
        if self._upcoming:
            self._look_around(model, weights, num_items_in_batch)
        with moved(weights, self._change):
            self._moved = True
            try:
                return super().training_step(model, inputs, num_items_in_batch)
            finally:
                self._moved = False

    def _look_around(self, model: Any, weights: Sequence[Tensor], counts: Any) -> None:
        """At theta, over the whole step: the retain part's gradient into `.grad`, the forget part's into `_change`."""
        model.train()
        total: list[Tensor | None] = [None] * len(weights)
        self._at_theta = []
        for batch in self._upcoming:
            with self.compute_loss_context_manager():
                parts = self.parts_of(model, self._prepare_inputs(batch), counts)
            before = [w.grad for w in weights]
            for weight in weights:
                weight.grad = None
            self.accelerator.backward(parts["forget_loss"], retain_graph=True)
            total = [_sum(g, w.grad) for g, w in zip(total, weights, strict=True)]
            for weight, gradient in zip(weights, before, strict=True):
                weight.grad = gradient
            self.accelerator.backward(self.args.retain_weight * parts["retain_loss"])
            self._at_theta.append({name: value.detach() for name, value in parts.items()})
        self._change, self._upcoming = perturbation(total, self.args.sam_rho), ()

    def as_stepped(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parts of a micro-batch as they are stepped on: inside a sharpness-aware step, those of moved weights.

        Only the forget part then has a gradient: that of the retain part has been taken at theta. `sharpness` is by how
        much the move raises the forget part.
        """
        if not self._moved:
            return parts
        at_theta, forget = self._at_theta.pop(0), parts["forget_loss"]
        return parts | {
            "loss": forget + self.args.retain_weight * at_theta["retain_loss"],
            "forget_loss": forget,
            "retain_loss": at_theta["retain_loss"],
            "sharpness": forget.detach() - at_theta["forget_loss"],
        }


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a.add_(b)
