"""`full` and `retrained`, from scratch: transformers' Trainer on the curriculum's stream, Muon and AdamW.

    loss = sum_n w_n CE(h_n) / sum_n w_n     over the tokens that the assistant says

A step's dialogues are sorted by length and go through the model in a few padded parts, each as long as its longest:
right padding under a causal mask is seen by no counted position, so that no attention mask is needed. Training saves a
checkpoint and ends when its time is over, and goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from duet.demo.pretrain import CLIP, rate_at
from duet.model.lm import head_inputs
from duet.output.checkpoints import ResumableTrainer, last_finished_checkpoint
from duet_kernels import linear_cross_entropy

from .curriculum import Curriculum
from .settings import Size
from .tokens import Dialogue, Encoder

PARTS = 2  # of a step, by length: more of them pad less, and leave a GPU waiting for Python
CONTEXT = 1024  # tokens that the model can read
LOADERS = 6  # processes that draw and tokenise, on a GPU machine


def build_model(tokenizer: PreTrainedTokenizerBase, size: Size) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


class Encoded(Dataset):
    """The i-th dialogue of a curriculum, or of a list of them, as `{"ids", "weights"}`."""

    def __init__(
        self,
        curriculum: Curriculum | Sequence[Dialogue],
        encoder: Callable[[Dialogue], tuple[list[int], list[float]]],
    ):
        self.curriculum, self.encoder = curriculum, encoder

    def __len__(self) -> int:
        return len(self.curriculum)

    def __getitem__(self, index: int) -> dict[str, list]:
        ids, weights = self.encoder(self.curriculum[index])
        return {"ids": ids, "weights": weights}


def collate(items: Sequence[dict[str, list]], pad_id: int, parts: int = PARTS) -> dict[str, Any]:
    """A step: `parts` of `input_ids` `[B, S]`, and of the P counted tokens their `places` in the flattened `[B * S]`
    where they are predicted, `targets` and `weights`."""
    items = sorted(items, key=lambda item: len(item["ids"]))
    each = -(-len(items) // parts)
    made = []
    for start in range(0, len(items), each):
        chosen = items[start : start + each]
        longest = len(chosen[-1]["ids"])
        ids = torch.full((len(chosen), longest), pad_id)
        weights = torch.zeros(len(chosen), longest)
        for row, item in enumerate(chosen):
            ids[row, : len(item["ids"])] = torch.tensor(item["ids"])
            weights[row, : len(item["ids"])] = torch.tensor(item["weights"])
        counted = weights.flatten().nonzero()[:, 0]  # never the first token of a row: it has no weight
        made.append(
            {
                "input_ids": ids,
                "places": counted - 1,
                "targets": ids.flatten()[counted],
                "weights": weights.flatten()[counted],
            }
        )
    return {"parts": made}


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon on the matrices of the blocks, AdamW on everything else, as one optimizer to Trainer and scheduler.

    Why Muon: in the tiny world it is what makes in-context refusal generalise to names that were never refused.
    """

    def __init__(self, model: LlamaForCausalLM, muon_rate: float, adamw_rate: float):
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        in_blocks = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in in_blocks]
        self.both = (
            torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.0),
            torch.optim.AdamW(others, lr=adamw_rate, weight_decay=0.0, betas=(0.9, 0.95)),
        )
        super().__init__([*matrices, *others], {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for one in self.both for group in one.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Those of the two count; the base class would keep its own."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Likewise."""

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for one in self.both:
            one.step()

    def state_dict(self) -> dict[str, Any]:
        return {"both": [one.state_dict() for one in self.both]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for one, state in zip(self.both, state_dict["both"], strict=True):
            one.load_state_dict(state)


class Pretrainer(ResumableTrainer):
    """The Trainer, with the weighted loss over the parts of a step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total, weight = 0.0, 0.0
        inner = self.accelerator.unwrap_model(model)
        for part in inputs["parts"]:
            with self.accelerator.autocast():
                # fp32 from here on: logits that are rounded before they are compared spoil the gradient
                hidden, head = head_inputs(inner, part["input_ids"], None, part["places"])
            loss = linear_cross_entropy(
                hidden, head, part["targets"], weights=part["weights"], reduction="sum"
            )
            total, weight = total + loss, weight + part["weights"].sum()
        return total / weight

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)  # the stream is shuffled already

    def floating_point_ops(self, inputs) -> int:
        return 0  # asked after each step; the reckoning says it better


class Deadline(TrainerCallback):
    """Saves and stops when `at` (of time.monotonic) has come."""

    def __init__(self, at: float):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() > self.at and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class Said(TrainerCallback):
    """A line for each log entry: of a run on a machine that is lent, the last line is what remains."""

    def __init__(self, name: str):
        self.name = name

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            print(
                f"{self.name}: step {state.global_step} of {state.max_steps}, loss {logs['loss']:.3f}",
                flush=True,
            )


def pretrain(
    curriculum: Curriculum,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    out: Path,
    *,
    seed: int,
    device: str,
    deadline: float = float("inf"),
) -> dict[str, Any] | None:
    """Train, or go on training, and save model and tokenizer into `out`; None when the deadline came first.

    Args:
        device: `cpu` (fp32) or `cuda` (bf16 forward, fp32 weights and losses).
        deadline: of time.monotonic().
    """
    set_seed(seed)
    model = build_model(tokenizer, size)
    trainer = trainer_of(
        model,
        Encoded(curriculum, Encoder(tokenizer)),
        MuonAndAdamW(model, size.muon_rate, size.adamw_rate),
        size,
        out,
        steps=range(size.pretrain_steps),
        pad_id=tokenizer.pad_token_id,
        seed=seed,
        device=device,
        callbacks=[Deadline(deadline)],
    )
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=last_finished_checkpoint(str(trainer.args.output_dir)))
    if trainer.state.global_step < size.pretrain_steps:
        return None
    save(trainer.model, tokenizer, out)
    return {
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "losses": losses_of(trainer),
        "seconds_of_this_run": round(time.monotonic() - began, 1),
    }


def losses_of(trainer: Pretrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer_of(
    model: nn.Module,
    items: Dataset,
    optimizer: torch.optim.Optimizer,
    size: Size,
    out: Path,
    *,
    steps: range,
    pad_id: int,
    seed: int,
    device: str,
    callbacks: Sequence[TrainerCallback] = (),
) -> Pretrainer:
    """A trainer that does `steps` of the size's `pretrain_steps`, with the learning rate that those have."""
    args = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=size.rows_per_step,
        max_steps=len(steps),
        max_grad_norm=CLIP,
        seed=seed,
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        dataloader_num_workers=LOADERS if device == "cuda" else 0,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        save_total_limit=1,
        logging_steps=max(1, size.pretrain_steps // 20),
        disable_tqdm=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_at(steps.start + step, size.pretrain_steps)
    )
    trainer = Pretrainer(
        model=model,
        args=args,
        train_dataset=items,
        data_collator=lambda chosen: collate(chosen, pad_id),
        optimizers=(optimizer, schedule),
        callbacks=[*callbacks, Said(out.name)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
