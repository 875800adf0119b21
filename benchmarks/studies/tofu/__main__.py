"""`python -m benchmarks.studies.tofu --data DIR`: does everything that is missing, then writes the page.

python -m benchmarks.studies.tofu --data DIR --size toy --anyway       minutes on a CPU: real rows through everything
python -m benchmarks.studies.tofu --data DIR --size 60m --only reckon  what it will cost, before it is paid
python -m benchmarks.studies.tofu --data DIR --size 60m --device cuda --budget-seconds 540    again and again, until all is done

With a pretrained model, which is fine-tuned on TOFU by an adapter instead of being trained from scratch:
python -m benchmarks.studies.tofu --data DIR --base FOLDER --plan      minutes of a GPU, piece by piece
python -m benchmarks.studies.tofu --data DIR --base FOLDER --device cuda --budget-seconds 540    again and again, until all is done
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from . import jobs
from .base import check_base
from .page import write_page
from .rows import SPLITS
from .settings import METHODS, PRETRAINED, SIZES, changed
from .work import work

OUT = Path("benchmarks/results/tofu")
SEEDS = (0, 1, 2)
GPU_WORKERS = 5  # small models leave a GPU waiting for Python: several processes share it
BASE_WORKERS = 2
NOT_REACHED, FAILED = 3, 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.tofu",
        description=__doc__.splitlines()[0],
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's .json files")
    parser.add_argument("--base", type=Path, help="folder of a pretrained model with a chat template")
    parser.add_argument("--split", choices=list(SPLITS), default="forget10", help="who is forgotten")
    parser.add_argument(
        "--size",
        choices=list(SIZES),
        help=f"default: toy; with --base {PRETRAINED}, the only other one for it",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of the size, changed"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", choices=["pretrain", "unlearn", "report", "reckon"])
    parser.add_argument(
        "--plan", action="store_const", dest="only", const="reckon", help="the same as --only reckon"
    )
    parser.add_argument(
        "--methods", nargs="+", help=f"default: {' '.join(METHODS)}; with --base those that train an adapter"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=list(SEEDS), help="of unlearning; default: 0 1 2"
    )
    parser.add_argument("--out", type=Path, help=f"default: {OUT}/SIZE; with --base {OUT}/BASE-SPLIT")
    parser.add_argument(
        "--budget-seconds", type=float, default=float("inf"), help="save and stop after so long"
    )
    parser.add_argument(
        "--workers",
        type=int,
        help=f"processes; default: {GPU_WORKERS} on a GPU (with --base {BASE_WORKERS}), else 0 (this one)",
    )
    parser.add_argument(
        "--anyway", action="store_true", help="go on where a gate does not hold; the page says so"
    )
    parser.add_argument("--keep-models", action="store_true", help="of every method and seed")
    chosen = parser.parse_args(arguments)
    try:
        study = _study(chosen)
        if chosen.only == "reckon":
            from .reckoning import reckon

            print(reckon(study, chosen.workers or _gpu_workers(study)))
            return 0
        if chosen.device == "cuda" and chosen.only != "report" and not torch.cuda.is_available():
            raise ValueError("device: wanted cpu, because there is no CUDA device here, got cuda")
        return _run(study, chosen)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _study(chosen: argparse.Namespace) -> jobs.Study:
    """What the arguments ask for; what is wrong with them, or with the files, is said before anything is done."""
    base, name = chosen.base, chosen.size or (PRETRAINED if chosen.base else "toy")
    if base is not None:
        check_base(base)
    if name not in (("toy", PRETRAINED) if base else SIZES) or (base is None and name == PRETRAINED):
        raise ValueError(
            f"size: wanted toy or {PRETRAINED} with --base, and another than {PRETRAINED} without, got {name}"
        )
    methods = tuple(chosen.methods or (m for m in METHODS if base is None or METHODS[m].by_adapter))
    jobs.check(methods, base)
    jobs.corpus_of(chosen.data, chosen.split)
    folder = name if base is None else f"{base.resolve().name}-{chosen.split}"
    return jobs.Study(
        chosen.data,
        chosen.out or OUT / folder,
        changed(SIZES[name], chosen.set),
        chosen.device,
        methods,
        tuple(chosen.seeds),
        chosen.keep_models,
        base,
        chosen.split,
    )


def _gpu_workers(study: jobs.Study) -> int:
    return BASE_WORKERS if study.base else GPU_WORKERS


def _run(study: jobs.Study, chosen: argparse.Namespace) -> int:
    ended = jobs.Ended(None, [])
    if chosen.only != "report":
        workers = (
            chosen.workers if chosen.workers is not None else _gpu_workers(study) * (chosen.device == "cuda")
        )
        ended = jobs.run(
            study,
            workers=workers,
            budget_seconds=chosen.budget_seconds,
            anyway=chosen.anyway,
            only=chosen.only,
            do=work,
            say=lambda text: print(text, flush=True),
        )
    for failure in ended.failed:
        print(f"failed: {failure}")
    if ended.why:
        print(ended.why)
    if chosen.only == "report" or jobs.read_results(study):
        print(f"wrote {write_page(study)}")
    if ended.failed:
        return FAILED
    return NOT_REACHED if ended.why and ended.why.startswith("not reached") else 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
