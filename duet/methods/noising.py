"""UNDO's second stage and its stop rule (arXiv 2506.06278): perturb an unlearned model, distil it until it is itself again.

    theta' = (1 - alpha) theta + alpha beta N      N Xavier-uniform for matrices, 0 for vectors

Knowledge that the unlearned model only hides is in its weights, and the noise damages it; what the model still says is
restored by distillation from the unlearned model (`methods.objectives.distillation.undo`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from duet_kernels import linear_cross_entropy

from ..model.lm import call_through
from ..model.switches import evaluating
from ..options import Count, NotNegative, Share

logger = logging.get_logger(__name__)


@dataclass
class UndoOptions:
    """Options of `undo`.

    Attributes:
        undo_alpha: share of noise in the student's first weights, (1 - alpha) theta + alpha beta N.
        undo_beta: size beta of the noise.
        undo_tolerance: training stops when the student's perplexity on retain rows is within this share of the
            teacher's. 0: never.
        undo_check_steps: how many steps lie between two looks at the perplexity on retain rows.
    """

    undo_alpha: Share = 0.6
    undo_beta: Share = 0.1
    undo_tolerance: NotNegative = 0.05
    undo_check_steps: Count = 25


@torch.no_grad()
def perturb(model: nn.Module, alpha: float, beta: float, seed: int = 0) -> nn.Module:
    """Multiplies every weight by 1 - alpha and adds alpha * beta times fresh noise, in place.

    Matrices (linear layers, embeddings; convolutions by their fans) get Xavier-uniform noise, U(-a, a) with
    a = sqrt(6 / (fan_in + fan_out)); vectors (biases, norms) none, so that they only shrink. Tied weights are one
    tensor and are perturbed once. alpha = 0 changes nothing; alpha = beta = 1 is a random initialisation whose norms
    are 0.

    Args:
        model: any module; parameters that require no gradient are perturbed too.
        alpha: in [0, 1]. beta: >= 0. The paper recommends 0.6 and 0.1.
        seed: of the noise, which depends on nothing else (it is drawn in fp32 on the CPU, parameter by parameter).

    Returns:
        `model`.

    Raises:
        ValueError: alpha or beta out of range.

    Example:
        >>> layer = perturb(nn.Linear(2, 2), alpha=0.0, beta=0.1)
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: wanted a number in [0, 1], got {alpha!r}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta: wanted a number >= 0, got {beta!r}")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # a tied parameter comes once
        parameter.mul_(1 - alpha)
        if parameter.dim() >= 2:
            noise = torch.empty(parameter.shape, dtype=torch.float32)
            nn.init.xavier_uniform_(noise, generator=generator)
            parameter.add_(noise.to(parameter), alpha=alpha * beta)
    return model


class RecoveryStop(TrainerCallback):
    """Ends training once the student's perplexity is within `tolerance` of the teacher's.

        perplexity_student <= (1 + tolerance) perplexity_teacher

    Args:
        perplexities: returns (student's, teacher's) perplexity on retain rows.
        tolerance: 0.05 is the paper's 5 %.
        every: looked at after every so many steps.
    """

    def __init__(self, perplexities: Callable[[], tuple[float, float]], tolerance: float, every: int):
        self.perplexities, self.tolerance, self.every = perplexities, tolerance, every

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every:
            return
        student, teacher = self.perplexities()
        if student <= (1 + self.tolerance) * teacher:
            logger.info(
                f"undo: after {state.global_step} steps the student's perplexity on retain rows is {student:.4g}, the "
                f"teacher's {teacher:.4g}: recovered"
            )
            control.should_training_stop = True


def start_undo(student: nn.Module, args: Any) -> None:
    """Perturbs the student; the teacher has been copied."""
    if hasattr(student, "peft_config"):
        raise ValueError(
            "peft_config: 'undo' perturbs the whole model and wanted one without an adapter; merge the adapter first "
            "(`duet merge`)"
        )
    perturb(student, args.undo_alpha, args.undo_beta, args.seed)


def prepare_undo(trainer: Any, dataset: Any) -> None:
    """Installs the stop rule, where there are retain rows to judge by."""
    args = trainer.args
    if dataset is trainer.train_dataset and args.undo_tolerance and dataset.num_retain:
        trainer.add_callback(
            RecoveryStop(lambda: retain_perplexities(trainer), args.undo_tolerance, args.undo_check_steps)
        )


@torch.no_grad()
def retain_perplexities(trainer: Any) -> tuple[float, float]:
    """(student's, teacher's) perplexity on the answers of the first 64 retain rows; of the whole text where there is no answer.

    What stands in a prompt is not counted beside an answer: a chat model was never taught to ask.
    """
    dataset, args = trainer.train_dataset, trainer.args
    prompts, answers = [], []
    for i in range(dataset.num_forget, dataset.num_forget + min(64, dataset.num_retain)):
        item, prompt = dataset[i], dataset.prompt(i)
        whole = [*item["student"], *item["answer"]]
        start = len(prompt) if len(prompt) < len(whole) else 1
        prompts.append(whole[:start])
        answers.append(whole[start:])
    wrapped = trainer.model_wrapped
    student = trainer.accelerator.unwrap_model(wrapped)
    totals = torch.zeros(2, device=args.device)
    for start in range(0, len(prompts), args.eval_batch_size):
        batch = [part[start : start + args.eval_batch_size] for part in (prompts, answers)]
        labels = torch.tensor([token for answer in batch[1] for token in answer], device=args.device)

        def nll(model: nn.Module, batch=batch, labels=labels) -> Tensor:
            hidden, head = trainer.states_of(model, *batch)
            return linear_cross_entropy(hidden, head, labels, reduction="sum", impl=args.impl)

        with evaluating(student):
            own = call_through(wrapped, student, lambda nll=nll: nll(student))
        totals += torch.stack([own, trainer.teacher.run(nll, student, wrapped)])
    own, teachers = (totals / sum(map(len, answers))).exp().tolist()
    return own, teachers
