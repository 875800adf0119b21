"""Model, tokenizer and options -> Provenance: what a cached teacher must agree in with the run that reads it."""

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from duet_kernels import LMHead

from ..config import DuetConfig
from ..data.dataset import UnlearnDataset
from ..methods.objectives import Objective, teacher_topk
from ..methods.views import scored_positions
from ..model.hashes import config_hash, template_hash, tokenizer_hash
from ..model.lm import base_language_model
from ..model.weights import weights_hash
from .read import LOGITS, Provenance, TopKStore
from .teacher import CachedTeacher


def provenance_of(
    model: nn.Module,
    head: LMHead,
    tokenizer: Any,
    args: DuetConfig,
    dataset: UnlearnDataset,
    objective: Objective,
    dtype: str = "float32",
) -> Provenance:
    """The provenance of targets that `model` makes for `dataset` under the options `args`."""
    inner = base_language_model(model)
    return Provenance(
        model=getattr(inner.config, "_name_or_path", "") or type(inner).__name__,
        architecture=type(inner).__name__,
        model_dtype=str(head.weight.dtype).removeprefix("torch."),
        weights=weights_hash(model),
        tokenizer=tokenizer_hash(tokenizer),
        chat_template=template_hash(tokenizer),
        chat_template_kwargs=args.prompting.chat_template_kwargs,
        plain_template=args.plain_template,
        prefixes=list(args.steering_prefixes),
        seed=dataset.seed,
        positions=scored_positions(objective, args),
        max_scored=dataset.max_scored,
        answers=dataset.answers,
        k=args.k,
        temperature=float(args.temperature),
        vocab_size=head.num_ids,
        softcap=head.softcap,
        scale=head.scale,
        dtype=dtype,
        config=config_hash(model),
        autocast="bfloat16" if args.bf16 else "float16" if args.fp16 else "none",
    )


def check_cacheable(objective: Objective, args: DuetConfig) -> None:
    """Refuses objectives that need more of a teacher than its top-k logits under a steering prefix."""
    if objective.targets is not teacher_topk or objective.teacher_sees != "steered":
        raise ValueError(
            f"teacher_store: objective {args.objective!r} needs something else than a steered teacher's top-k logits, "
            "which is all that a store has; use one of the duet objectives, or no store"
        )
    if args.entropy_weighting:
        raise ValueError("entropy_weighting: wanted False, because a teacher_store has no entropies")


def open_store(
    store: str | os.PathLike | TopKStore | None, objective: Objective, args: DuetConfig, teacher_model: Any
) -> TopKStore | None:
    """The opened store of a run, checked before anything large is loaded; None: the run has none."""
    if not store:
        return None
    if teacher_model is not None:
        raise ValueError("teacher_model: wanted None, because teacher_store takes its place")
    check_cacheable(objective, args)
    store = store if isinstance(store, TopKStore) else TopKStore(store)
    made = store.provenance
    if made.values != LOGITS and objective.raw_logits:
        raise ValueError(
            f"teacher_store: values: objective {args.objective!r} compares raw logits, the store has {made.values}; use "
            "a distribution objective such as 'duet_forward_kl'"
        )
    if args.k > made.k:
        raise ValueError(
            f"teacher_store: k: the store has the {made.k} largest logits, this run wants {args.k}"
        )
    return store


def cached_teacher(
    store: TopKStore,
    model: nn.Module,
    head: LMHead,
    tokenizer: Any,
    objective: Objective,
    args: DuetConfig,
    datasets: Sequence[UnlearnDataset],
) -> tuple[CachedTeacher, str]:
    """The teacher that reads a store for `model`, checked, and the hash of the model's weights.

    The teacher serves the datasets, the first of which is trained on. A store with a larger k, another seed or any storage dtype
    is allowed.

    Raises:
        ValueError: naming the field that differs, what the store has and what this run has; or what the store lacks.
    """
    wanted = provenance_of(model, head, tokenizer, args, datasets[0], objective)
    free = ["k", "seed", "dtype", "values"]
    if not args.teacher_store_same_model:
        free += ["architecture", "model_dtype", "weights", "softcap", "scale", "config", "autocast"]
    store.provenance.refuse_another(wanted, free)
    teacher = CachedTeacher(store, args.k)
    for dataset in datasets:
        teacher.serve(dataset)
    return teacher, wanted.weights
