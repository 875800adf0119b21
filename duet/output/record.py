"""Everything that determines a run, written beside its checkpoints when it starts and compared when it is resumed.

    run_record.json    options, model, tokenizer, adapter, teacher, rows: by value where that is short, else by hash

A resumed run must have the options and rows that it started with; otherwise it is refused, and what changed is named.
Every option is compared except those of MAY_CHANGE.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

from ..folders import disk_named, write_atomically
from ..model.adapters import trained_config
from ..model.hashes import config_hash, tokenizer_hash
from ..model.lm import base_language_model
from ..model.weights import older_weights

logger = logging.get_logger(__name__)

RECORD = "run_record.json"

# Why an option may change at a resume -> which options.
MAY_CHANGE = {
    "names where results go": """
        output_dir run_name project trackio_space_id trackio_bucket_id trackio_static_space_id push_to_hub hub_token
        hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""",
    "only changes what is shown": """
        logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level
        log_level_replica disable_tqdm report_to debug skip_memory_metrics include_num_input_tokens_seen""",
    "says when to save or to look, which moves no weight": """
        save_strategy save_steps save_total_limit save_on_each_node enable_jit_checkpoint
        load_best_model_at_end metric_for_best_model greater_is_better eval_strategy eval_steps eval_delay eval_on_start
        eval_accumulation_steps eval_do_concat_batches eval_use_gather_object per_device_eval_batch_size
        batch_eval_metrics prediction_loss_only include_for_metrics bf16_full_eval fp16_full_eval do_train do_eval
        do_predict""",
    "says what a checkpoint holds; from weights alone no run is resumed (`duet.output.checkpoints`)": "save_only_model",
    "says where tensors are and how they get there: the same numbers, up to rounding": """
        use_cpu local_rank fsdp fsdp_config deepspeed parallelism_config ddp_backend ddp_find_unused_parameters
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_timeout dataloader_num_workers
        dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context""",
    "trades memory for time: the same numbers, up to rounding": """
        activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
        use_cache torch_empty_cache_steps use_liger_kernel liger_kernel_config padding_free reuse_prefix
        workspace_bytes impl
        full_determinism""",
    "controls the resume itself": """
        resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint""",
    "is compared by what it stands for: queries_per_step, teacher, weights": """
        per_device_train_batch_size gradient_accumulation_steps teacher_store model_init_kwargs""",
}
# The length of a run: it may be increased. What was learned so far stays the same.
MAY_GROW = ("max_steps", "num_train_epochs")
# Fields of an adapter's configuration that say where its base is, and how it was loaded this time.
_NOT_OF_THE_ADAPTER = "base_model_name_or_path revision inference_mode peft_version auto_mapping"


def run_record(
    model: nn.Module,
    weights: str,
    tokenizer: Any,
    args: TrainingArguments,
    rows: Mapping[str, tuple[int, str]],
    teacher: str | None,
) -> dict[str, Any]:
    """Everything that determines a run, as plain values.

    Args:
        model: its class, dtype and adapters are recorded.
        weights: a hash of the weights before training.
        tokenizer: with its chat template.
        args: the options.
        rows: name -> (number, fingerprint).
        teacher: a hash of another model's weights, or of a store's contents; None: the model teaches itself.
    """
    excused = {name for names in MAY_CHANGE.values() for name in names.split()}
    record: dict[str, Any] = {k: v for k, v in args.to_dict().items() if k not in excused}
    inner = base_language_model(model)
    micro_batches = args.gradient_accumulation_steps * args.world_size
    record |= {
        "queries_per_step": args.per_device_train_batch_size * micro_batches,
        "architecture": type(inner).__name__,
        "model_dtype": str(inner.dtype).removeprefix("torch."),
        "weights": weights,
        "model_config": config_hash(model),
        "tokenizer": tokenizer_hash(tokenizer, template=True),
        "teacher": teacher,
        "forget rows": rows.get("forget"),
        "retain rows": rows.get("retain"),
        "adapter.peft_type": None,
    }
    if config := trained_config(model):
        options = {k: v for k, v in config.to_dict().items() if k not in _NOT_OF_THE_ADAPTER.split()}
        record |= {f"adapter.{name}": value for name, value in options.items()}
    return json.loads(json.dumps(record, default=_plain))


def begin_run(
    folder: str | os.PathLike, record: Mapping[str, Any], begun_in: str | os.PathLike | None = None
) -> None:
    """Writes the record of a run that starts or is resumed.

    Args:
        folder: of its checkpoints.
        record: of the run now.
        begun_in: the folder of the run that is resumed, if any.

    Raises:
        ValueError: the records differ; see `refuse_another`.
    """
    if begun_in:
        began = read_record(begun_in)
        if began is None:
            logger.warning(
                f"{begun_in} has no {RECORD}: whether this run's options and rows are those that it began with is not "
                "known"
            )
        else:
            refuse_another(began, record, begun_in)
    write_record(folder, record)


@contextmanager
def refused_by_all() -> Iterator[None]:
    """Around what process 0 alone does: what it refuses all refuse, who would otherwise wait for it until a timeout."""
    refusal = None
    try:
        yield
    except (ValueError, OSError) as error:
        refusal = error
    (said,) = broadcast_object_list([None if refusal is None else str(refusal)])
    if said is not None:
        raise refusal or ValueError(said)


def write_record(folder: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Writes the record into a run's folder, atomically; what could not be written whole is removed."""
    path = Path(folder, RECORD)
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_named(folder, "output_dir"):
        write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())


def read_record(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The record of a run's folder; None: it has none.

    Raises:
        ValueError: it is damaged.
    """
    path = Path(folder, RECORD)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: wanted the record of a run as JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: wanted the record of a run, got {record!r:.60}")
    return record


def refuse_another(began: Mapping[str, Any], now: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Compares the record of a run's start with the one of its resume.

    A name that only one of them has is ignored: it comes from another version of a library. So is, with a warning, a hash
    of weights that an older version of duet made in another way.

    Raises:
        ValueError: naming everything that differs, with both values.

    Example:
        >>> refuse_another({"k": 8, "max_steps": 4}, {"k": 8, "max_steps": 6}, "out")
        >>> refuse_another({"k": 8, "max_steps": 4}, {"k": 9, "max_steps": 4}, "out")
        Traceback (most recent call last):
        ...
        ValueError: k: the run in 'out' began with 8, this one has 9. Change it back, or start anew in another output_dir
    """
    differences = []
    for name, before in began.items():
        after = now.get(name, before)
        if older_weights(before, after):
            logger.warning(
                f"{name}: the run in {os.fspath(folder)!r} was begun by an older version of duet, whose hash of the weights "
                "cannot be compared with today's: make sure that the model is the one it began with"
            )
            continue
        if before != after and not (name in MAY_GROW and 0 < before < after):
            only = " (it may only grow)" if name in MAY_GROW else ""
            differences.append(
                f"{name}: the run in {os.fspath(folder)!r} began with {before!r}, this one has {after!r}{only}"
            )
    if differences:
        raise ValueError(f"{'; '.join(differences)}. Change it back, or start anew in another output_dir")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
