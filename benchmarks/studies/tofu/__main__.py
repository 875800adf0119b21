"""`python -m benchmarks.studies.tofu --data DIR`: does everything that is missing, then writes the page.

python -m benchmarks.studies.tofu --data DIR --size toy --anyway       minutes on a CPU: real rows through everything
python -m benchmarks.studies.tofu --data DIR --size 60m --only reckon  what it will cost, before it is paid
python -m benchmarks.studies.tofu --data DIR --size 60m --device cuda --budget-seconds 540    again and again, until all is done
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from . import jobs
from .page import write_page
from .settings import METHODS, SIZES, changed
from .work import work

OUT = Path("benchmarks/results/tofu")
SEEDS = (0, 1, 2)
GPU_WORKERS = 5  # small models leave a GPU waiting for Python: several processes share it
NOT_REACHED, FAILED = 3, 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.tofu",
        description=__doc__.splitlines()[0],
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's .json files")
    parser.add_argument("--size", choices=list(SIZES), default="toy")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of the size, changed"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", choices=["pretrain", "unlearn", "report", "reckon"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"default: {' '.join(METHODS)}")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=list(SEEDS), help="of unlearning; default: 0 1 2"
    )
    parser.add_argument("--out", type=Path, help=f"default: {OUT}/SIZE")
    parser.add_argument(
        "--budget-seconds", type=float, default=float("inf"), help="save and stop after so long"
    )
    parser.add_argument(
        "--workers", type=int, help=f"processes; default: {GPU_WORKERS} on a GPU, else 0 (this one)"
    )
    parser.add_argument(
        "--anyway", action="store_true", help="go on where a gate does not hold; the page says so"
    )
    parser.add_argument("--keep-models", action="store_true", help="of every method and seed")
    chosen = parser.parse_args(arguments)
    try:
        jobs.check(chosen.methods)
        jobs.corpus_of(chosen.data)  # what is wrong with the files is said before anything is done
        size = changed(SIZES[chosen.size], chosen.set)
        if chosen.only == "reckon":
            from .reckoning import reckon

            print(reckon(size, chosen.data, chosen.methods, len(chosen.seeds), chosen.workers or GPU_WORKERS))
            return 0
        if chosen.device == "cuda" and chosen.only != "report" and not torch.cuda.is_available():
            raise ValueError("device: wanted cpu, because there is no CUDA device here, got cuda")
        study = jobs.Study(
            chosen.data,
            chosen.out or OUT / chosen.size,
            size,
            chosen.device,
            tuple(chosen.methods),
            tuple(chosen.seeds),
            chosen.keep_models,
        )
        return _run(study, chosen)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(study: jobs.Study, chosen: argparse.Namespace) -> int:
    ended = jobs.Ended(None, [])
    if chosen.only != "report":
        workers = chosen.workers if chosen.workers is not None else GPU_WORKERS * (chosen.device == "cuda")
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
