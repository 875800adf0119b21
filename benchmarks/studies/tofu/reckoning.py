"""What the study will cost on one H200, reckoned from the stream it will read: nothing here was measured on a GPU.

    parameters   L (4 D^2 + 3 D F) + V D            layers, width, feed-forward; tied embeddings
    FLOP         6 per parameter of the blocks and padded token; 6 D V per counted token for the loss
    step         max(arithmetic, Python) + optimizer: kernels so small that Python often decides
    decoding     one step of a batch takes Python's time, whatever the batch

The assumptions are below; each is a guess to be replaced by what the first run measures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import AutoTokenizer

from .base import MOST_BYTES, TemplateEncoder, shape_of
from .base import stream as said_of
from .curriculum import KINDS, Curriculum, every_text
from .jobs import Study
from .pretrain import PARTS, Encoded, collate
from .rows import rows_of
from .settings import Size
from .tokens import Encoder, train_tokenizer

HALF_RATE, FULL_RATE = (
    250e12,
    35e12,
)  # FLOP/s of products this small, bf16 and fp32; 790e12 and 60e12 are the ceilings
BANDWIDTH = 3.5e12  # bytes/s
PASSES = 90  # over [tokens, D] in fp32, forward and backward, of a layer's norms, rotations, gates and sums
LAYER_SECONDS = 0.6e-3  # Python and launches of a layer, forward or backward
MATRIX_SECONDS = 0.25e-3  # Muon, a matrix
STEP_SECONDS = 8e-3  # of the Trainer, whatever the model
DECODE_SECONDS, DECODE_LAYER_SECONDS = 3e-3, 0.5e-3  # one greedy step
START_SECONDS = 25  # imports and a CUDA context, a process
SHARED = 0.6  # of the speed-up that w processes on one GPU would bring if they did not meet
SAMPLE = 20  # steps looked at


def parameters(size: Size) -> tuple[int, int]:
    """Of the blocks' matrices, and of the embeddings, which the head shares."""
    blocks = size.layers * (4 * size.hidden**2 + 3 * size.hidden * size.feed_forward)
    return blocks, size.vocab * size.hidden


def reckon(study: Study, workers: int) -> str:
    """A page of Markdown: what is trained on how much, and how long each stage will take."""
    corpus, size, methods, seeds = study.corpus, study.size, study.methods, len(study.seeds)
    plain_rows = rows_of([*corpus.forget, *corpus.retain])
    length, shape = size.pretrain_steps * size.rows_per_step, None
    if study.base is None:
        tokenizer: Any = train_tokenizer(every_text(corpus), size.vocab)
        curriculum = Curriculum(corpus, True, 0, length)
        stream, (blocks, embeddings) = Encoded(curriculum, Encoder(tokenizer)), parameters(size)
        exposures = length * KINDS.count("plain") / len(KINDS) / len(curriculum.plain_rows)
        optimizer, pad_id = size.layers * 7 * MATRIX_SECONDS, tokenizer.pad_token_id
    else:
        tokenizer = AutoTokenizer.from_pretrained(study.base)
        shape = shape_of(study.base, size.lora_rank)
        stream = Encoded(said_of(plain_rows, 0, length), TemplateEncoder(tokenizer))
        blocks, embeddings = shape.blocks, shape.embeddings
        size = replace(
            size,
            layers=shape.layers,
            hidden=shape.hidden,
            feed_forward=shape.feed_forward,
            vocab=len(tokenizer),
        )
        exposures, optimizer, pad_id = length / len(plain_rows), 0.0, 0
    middle = len(stream) // 2  # where the stream is no longer easy
    real = padded = counted = 0.0
    for step in range(SAMPLE):
        start = min(middle + step * size.rows_per_step, len(stream) - size.rows_per_step)
        items = [stream[start + i] for i in range(size.rows_per_step)]
        parts = collate(items, pad_id)["parts"]
        real += sum(len(item["ids"]) for item in items) / SAMPLE
        padded += sum(part["input_ids"].numel() for part in parts) / SAMPLE
        counted += sum(len(part["targets"]) for part in parts) / SAMPLE
    step = _train_step(size, blocks, embeddings, padded, counted, PARTS) + optimizer + STEP_SECONDS
    flop = size.pretrain_steps * (6 * blocks * padded + 6 * embeddings * counted)

    rows = plain_rows
    encoded = [
        len(tokenizer(row["question"])["input_ids"]) + len(tokenizer(row["answer"])["input_ids"])
        for row in rows
    ]
    mean, longest = sum(encoded) / len(encoded), max(encoded)
    batch = size.forget_per_step * (1 + size.retain_per_forget)
    # Student forward and backward, teacher forward (a third); padded to the longest of the batch.
    unlearning = _train_step(size, blocks, embeddings, batch * longest * 4 / 3, batch * mean * 4 / 3, 4 / 3)
    unlearning += STEP_SECONDS
    unlearn = size.unlearn_steps * unlearning
    decode = DECODE_SECONDS + size.layers * DECODE_LAYER_SECONDS
    deep = _answers(len(rows), size.batch_size, size.max_answer_tokens) * decode
    deep += 3 * len(rows_of(corpus.forget)) * (size.layers * LAYER_SECONDS + 10e-3)
    suite = (_batches(400, size) * 2 + _batches(100, size) + _batches(117, size)) * 120 * decode
    scored = (2 * 400 * 7 + 100 * 5 + 117 * 5) * longest
    suite += scored * 4 * blocks / FULL_RATE + 10
    variants = 4 + 4 * size.reverse_prompts + 2 + len(size.relearn_rates) * len(size.relearn_curve)
    attacks = variants * _batches(size.attack_rows, size) * size.max_new_tokens * decode
    attacks += (
        len(size.relearn_rates) * max(size.relearn_curve) * (2 * size.layers * LAYER_SECONDS + 8e-3) + 10
    )
    trial = unlearn + 3 * 80 * decode
    examine = suite + attacks
    tried = len(methods) * size.rates_tried if size.rates_tried > 1 else 0
    extra_deep = deep if "duet_deep" in methods else 0.0
    faster = max(1.0, SHARED * workers)
    stages = {
        f"{'fine-tune' if shape else 'pretrain'} full and retrained, side by side": (
            2,
            2 * max(size.pretrain_steps * step / 1.3, 1.0),
        ),
        "gate": (
            1,
            9 * max(1, _batches(size.gate_rows, size)) * size.max_new_tokens * decode + START_SECONDS,
        ),
        f"trials of learning rates ({workers} processes)": (
            tried,
            (tried * trial + size.rates_tried * extra_deep) / faster,
        ),
        f"unlearn and examine ({workers} processes)": (
            2 + len(methods) * seeds,
            ((2 + len(methods) * seeds) * examine + seeds * (len(methods) * unlearn + extra_deep)) / faster,
        ),
    }
    total = sum(seconds for _, seconds in stages.values()) + START_SECONDS
    held = "weights" if shape else "weights, gradients, two moments, a checkpoint's copy"
    training = 4 * (blocks + embeddings) * (1 if shape else 5) + padded * size.hidden * 4 * size.layers * 34
    lines = [
        "Reckoned, not measured (assumptions: benchmarks/studies/tofu/reckoning.py).",
        "",
        f"* model: {(blocks + embeddings) / 1e6:.1f} M parameters, {blocks / 1e6:.1f} M of them in {size.layers} blocks; "
        f"vocabulary {len(tokenizer):,}",
        f"* stream: {len(stream):,} dialogues, {len(stream) * real / size.rows_per_step / 1e6:.0f} M tokens "
        f"({padded / real:.2f} x with padding, {counted / real:.2f} counted); each plain row {exposures:.0f} times",
        f"* {'fine-tuning' if shape else 'pretraining'}: {size.pretrain_steps:,} steps of {padded:,.0f} padded tokens, {flop / 1e15:.1f} PFLOP and "
        f"{1e3 * step:.0f} ms a step for each model",
        f"* memory of one of them: {training / 2**30:.1f} GiB ({held}, 34 "
        "activations of [tokens, D] a layer in fp32)",
        f"* unlearning: {size.unlearn_steps} steps of {batch:.0f} queries, {1e3 * unlearning:.0f} ms each; duet_deep first asks "
        f"for {deep:.0f} s; one model is examined in {examine:.0f} s (suite {suite:.0f}, attacks {attacks:.0f})",
        "",
        "| stage | jobs | seconds |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {count} | {seconds:.0f} |" for name, (count, seconds) in stages.items()),
        f"| all | | {total:.0f} |",
    ]
    if shape is not None:
        piece = size.pretrain_steps / size.pieces * step + START_SECONDS
        pieces = {
            "fine-tune: so many steps of full, or of retrained": (2 * size.pieces, piece),
            "gate": (1, stages["gate"][1]),
            "trial of a learning rate": (tried, trial + START_SECONDS),
            "unlearn": (len(methods) * seeds, unlearn + extra_deep + START_SECONDS),
            "examine one model (goes on between batches)": (
                2 + len(methods) * seeds,
                examine + START_SECONDS,
            ),
        }
        lines += [
            "",
            f"An adapter of rank {size.lora_rank}: {shape.adapter_bytes / 2**20:.1f} MiB in files of at most {MOST_BYTES >> 20} MiB; "
            "full and retrained have one each, and a method has one until it is examined.",
            "",
            "| piece | pieces | minutes each |",
            "| --- | ---: | ---: |",
            *(f"| {name} | {count} | {seconds / 60:.1f} |" for name, (count, seconds) in pieces.items()),
        ]
    return "\n".join(lines)


def _train_step(
    size: Size, blocks: int, embeddings: int, padded: float, counted: float, parts: float
) -> float:
    arithmetic = 6 * blocks * padded / HALF_RATE + 6 * embeddings * counted / FULL_RATE
    arithmetic += size.layers * PASSES * padded * size.hidden * 4 / BANDWIDTH
    python = parts * 2 * size.layers * LAYER_SECONDS
    return max(arithmetic, python)


def _batches(rows: int, size: Size) -> int:
    return -(-rows // size.batch_size)


def _answers(rows: int, batch: int, tokens: int) -> int:
    return -(-rows // batch) * tokens
