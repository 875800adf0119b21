"""One method, one learning rate, one seed -> the full model after unlearning, through `DuetTrainer` as a user would.

Every method sees the same number of queries: unlearn_steps x forget_per_step x (1 + retain_per_forget), whatever it
makes of them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from duet.config import DuetConfig
from duet.trainer import DuetTrainer

from .rows import Row, says_name
from .settings import Method, Size

WARM_UP = 10


def unlearn(
    method: Method,
    rate: float,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Row],
    retain: Sequence[Row],
    size: Size,
    *,
    seed: int,
    device: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """`model`, which is trained in place, and what it took: seconds, queries, forget rows that the method could use.

    Args:
        rate: learning rate of the stages that do not bring their own.
        forget, retain: rows with `question` and `answer`, those to forget with `subject`.
    """
    if method.names_only:
        forget = [row for row in forget if says_name(row)]
    # A question about nobody by name may stand in both files; it is to be forgotten.
    asked = {row["question"] for row in forget}
    retain = [row for row in retain if row["question"] not in asked]
    per_step = size.forget_per_step * (1 + size.retain_per_forget)
    steps = max(1, size.unlearn_steps // len(method.stages))
    began = time.monotonic()
    for stage in method.stages:
        with tempfile.TemporaryDirectory(prefix="duet-tofu-") as scratch:
            options = {"learning_rate": rate} | stage
            args = DuetConfig(
                output_dir=scratch,
                max_steps=steps,
                warmup_steps=min(WARM_UP, steps // 2),
                per_device_train_batch_size=round(per_step),
                per_device_eval_batch_size=size.batch_size,
                retain_per_forget=size.retain_per_forget,
                max_answer_tokens=size.max_answer_tokens,
                impl=size.impl,
                weight_decay=0.0,
                max_grad_norm=1.0,
                seed=seed,
                use_cpu=device == "cpu",
                bf16=device == "cuda",
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                **options,
            )
            trainer = DuetTrainer(
                model=model,
                args=args,
                forget_dataset=list(forget),
                retain_dataset=list(retain),
                processing_class=tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            model = trainer.model
    return model.eval(), {
        "train_seconds": round(time.monotonic() - began, 1),
        "queries": round(steps * len(method.stages) * per_step),
        "forget_rows": len(forget),
    }
