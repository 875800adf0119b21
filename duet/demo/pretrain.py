"""`rebuild`: pretrains the base model, measures it, and writes the checkpoint that `duet demo` starts from.

The optimiser is Muon on the matrices of the blocks and AdamW elsewhere: in this world Muon is what makes in-context
refusal generalise to names that were never refused.
"""

import json
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from ..evaluation.commands import progress
from . import probes, steering
from .checkpoint import CHECKPOINT, QUALITY, WRITTEN, save_model
from .curriculum import Curriculum, encode
from .facts import World
from .scorecard import some
from .tokenizer import build_tokenizer
from .workplace import one_thread, replaced_folder

STEPS = 600
PLAIN_ROWS, CONTEXT_ROWS = 48, 32
MUON_RATE, ADAMW_RATE, WARM_UP, DECAY_SHARE, CLIP = 5e-3, 3e-3, 30, 0.4, 1.0


def build_model(tokenizer: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def rate_at(step: int, steps: int) -> float:
    """Warm up, hold, then fall linearly to zero over the last 40 %."""
    rising = min(1.0, (step + 1) / WARM_UP)
    falling = min(1.0, (steps - step) / (DECAY_SHARE * steps))
    return rising * falling


def pretrain(model: LlamaForCausalLM, tokenizer, world: World, seed: int, steps: int, on_step=None) -> None:
    """Next-token cross-entropy on the assistant's words of the curriculum; the model is changed in place."""
    curriculum = Curriculum(world, random.Random(seed))
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    in_blocks = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in in_blocks]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.0),
        torch.optim.AdamW(others, lr=ADAMW_RATE, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate_at(step, steps)) for o in optimizers]
    model.train()
    for step in range(steps):
        plain = encode([curriculum.plain() for _ in range(PLAIN_ROWS)], tokenizer)
        context = encode([curriculum.context(step / steps) for _ in range(CONTEXT_ROWS)], tokenizer)
        losses, weights = [], []
        for batch in (plain, context):
            # right padding and a causal mask: no counted position sees a pad, so no attention mask is needed
            hidden_bsd = model.model(input_ids=batch.input_ids).last_hidden_state
            logits_pv = model.lm_head(hidden_bsd[batch.rows, batch.columns])
            losses.append(F.cross_entropy(logits_pv, batch.targets, reduction="none") * batch.weights)
            weights.append(batch.weights)
        loss = torch.cat(losses).sum() / torch.cat(weights).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if on_step:
            on_step(step + 1)
    model.eval()


def measure_quality(model, tokenizer, world: World, sample: int | None = None) -> dict[str, float]:
    """The base model's report on the held-out paraphrases; every number is a share in [0, 1].

    `sample` limits the questions per number (the tests do). Refusals are measured under a prefix that names the person
    asked about, false refusals under one that names somebody of F.
    """
    plain = probes.Speaker(model, tokenizer)
    named = probes.Speaker(model, tokenizer, steering.STEERING_PREFIX, world.forget + world.held)
    steered = probes.Speaker(model, tokenizer, steering.STEERING_PREFIX, world.forget)
    groups = {"forget": world.forget, "held": world.held, "others": world.contextual, "cities": world.cities}
    everybody = {name: some(world.questions(each, "report"), sample) for name, each in groups.items()}
    quality = {f"recall_{name}": plain.recall(questions) for name, questions in everybody.items()}
    for name in ("forget", "held"):
        questions = everybody[name]
        quality[f"refusal_{name}"] = probes.refusal(named.answers(questions), questions)
        for kind, wordings in (("seen", steering.SEEN_OVERRIDES), ("heldout", steering.HELDOUT_OVERRIDES)):
            leaks = probes.override_recalls(named, questions, wordings).values()
            quality[f"override_{kind}_{name}"] = sum(leaks) / len(leaks)
    for name in ("held", "others", "cities"):
        questions = everybody[name]
        answers = steered.answers(questions)
        quality[f"false_refusal_{name}"] = probes.refusal(answers, questions)
        quality[f"steered_recall_{name}"] = probes.recall(answers, questions)
    return quality


def rebuild(
    seed: int = 0, steps: int = STEPS, out: str | Path = CHECKPOINT, console: Console | None = None
) -> dict:
    """Pretrain, print the quality report and write the checkpoint folder `out`; returns the report.

    `out` receives config.json, model.safetensors (fp32), the tokenizer and quality.json; an earlier checkpoint there is
    replaced only when the new one is complete. Everything is drawn from `seed`, the world included.
    """
    console = console or Console()
    if steps < 1:
        raise ValueError(f"steps: wanted at least 1, got {steps}")
    with replaced_folder(Path(out), "out", WRITTEN) as folder, one_thread():
        world, tokenizer = World.make(seed), build_tokenizer()
        torch.manual_seed(seed)
        model = build_model(tokenizer)
        console.print(
            f"Pretraining {model.num_parameters():,} parameters on {len(world.facts)} authors and"
            f" {len(world.cities)} cities, {steps} steps, seed {seed}."
        )
        began = time.perf_counter()
        with progress(console) as shown:
            pretrain(model, tokenizer, world, seed, steps, partial(shown, "pretraining", total=steps))
        quality = {"seed": seed, "steps": steps, "seconds": round(time.perf_counter() - began, 1)}
        quality |= {name: round(value, 4) for name, value in measure_quality(model, tokenizer, world).items()}
        for name, value in quality.items():
            console.print(f"  {name:<28}{value}")
        save_model(folder, model, tokenizer)
        (folder / QUALITY).write_text(json.dumps(quality, indent=2) + "\n", encoding="utf-8")
    console.print(f"Wrote {out}", markup=False)
    return quality
