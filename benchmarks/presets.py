"""Which cases a named run measures. Sizes are those of named models; a CPU gets what two cores do in minutes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from benchmarks.cases import DIVERGENCES, LOSSES, OPS, Case

# Llama-3's vocabulary, and at 8192 tokens the size that the floors of MATH.md are about.
GPU_ANCHOR = {"n": 8192, "d": 4096, "v": 128256, "k": 64, "dtype": torch.bfloat16}
CPU_ANCHOR = {"n": 512, "d": 1024, "v": 128256, "k": 64, "dtype": torch.float32}
QUICK = {"n": 64, "d": 64, "v": 4000, "k": 16}

GPU_SWEEPS = {
    "n": (16, 64, 1024, 8192, 32768),
    "v": (32000, 128256, 151936, 262144),  # Llama-2, Llama-3, Qwen, Gemma
    "k": (8, 32, 64, 128, 512, 1000),
}
CPU_SWEEP_BASE = {"n": 256, "d": 512, "v": 32000, "k": 64}
CPU_SWEEPS = {"n": (16, 64, 256, 1024), "v": (8000, 32000, 128256), "k": (8, 64, 512)}
CPU_DENSE_N = 256  # a dense loss of more tokens takes a peer half a minute on a CPU


def _anchor(device: torch.device) -> list[Case]:
    """Every operation, divergence and kind of head at one shape."""
    if device.type == "cuda":
        made = [
            (i + trainable, Case(op, divergence=divergence, trainable=trainable, **GPU_ANCHOR))
            for op in OPS
            for i, divergence in enumerate(DIVERGENCES.get(op, ("",)))
            for trainable in ((False, True) if op in LOSSES else (False,))
        ]
        # Every operation once before any a second time: a run may end before its last case.
        return [case for _, case in sorted(made, key=lambda pair: pair[0])]
    half = {**CPU_ANCHOR, "n": 128}  # dense losses take seconds a call
    return [
        Case("linear_topk", **CPU_ANCHOR),
        Case("topk_distill_loss", divergence="huber", **CPU_ANCHOR),
        Case("topk_distill_loss", divergence="forward_kl", trainable=True, **half),
        Case("linear_distill_loss", divergence="forward_kl", **half),
        Case("linear_cross_entropy", **half),
        Case("linear_token_stats", **half),
    ]


def _sweeps(device: torch.device) -> list[Case]:
    """One size varied at a time around a base; the top-k loss in all of them, the others where they scale."""
    on_gpu = device.type == "cuda"
    sweeps = GPU_SWEEPS if on_gpu else CPU_SWEEPS
    base = {**GPU_ANCHOR, "n": 1024} if on_gpu else CPU_SWEEP_BASE
    bases = [
        Case("topk_distill_loss", divergence="forward_kl", **base),
        Case("linear_topk", **base),
        Case("linear_distill_loss", divergence="forward_kl", **base),
        Case("linear_cross_entropy", **base),
    ]
    swept = {"linear_distill_loss": "nv", "linear_cross_entropy": "n"}  # where it is not all three
    made = [
        dataclasses.replace(case, **{size: value})
        for case in bases
        for size, values in sweeps.items()
        if size in swept.get(case.op, "nvk")
        for value in values
        if on_gpu or size != "n" or value <= CPU_DENSE_N or case.op not in swept
    ]
    return list(dict.fromkeys(made))


def _quick(device: torch.device) -> list[Case]:
    return [Case(op, divergence=d, **QUICK) for op in OPS for d in DIVERGENCES.get(op, ("",))]


PRESETS: dict[str, Callable[[torch.device], list[Case]]] = {
    "quick": _quick,
    "anchor": _anchor,
    "sweeps": _sweeps,
    "cpu": lambda device: list(dict.fromkeys(_anchor(device) + _sweeps(device))),
}
