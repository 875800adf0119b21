"""Every number of the README comes from here: `python -m benchmarks.readme` fills its marked blocks from results.

    cpu     benchmarks/results/cpu/goals.md            made by `make bench`
    bench   benchmarks/results/*/{bench,gate}.jsonl    made by `make bench-cpu`, `make gpu`
    demo    benchmarks/results/demo/results.json       taken over from demo_report/ with --demo DIR

`--check` writes nothing and exits 1 when the README says something else than the results.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
import shutil
import sys

from benchmarks import report
from benchmarks.harness import read_rows

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = pathlib.Path(__file__).parent / "results"
KEPT_OF_DEMO = ("results.json", "overview.png")

COLUMNS = {
    "forget_recall": "forget recall ↓",
    "forget_refusal": "refusal ↑",
    "retain_recall": "retain ↑",
    "neighbour_recall": "neighbours ↑",
    "reverse_prompt_recall": "reverse prompt ↓",
    "reverse_prompt_heldout_recall": "…unseen wording ↓",
    "prefill_recall": "prefill ↓",
    "relearn_recall": "relearned ↓",
    "int8_forget_recall": "int8 ↓",
    "int4_forget_recall": "int4 ↓",
}


def demo_block() -> str:
    """The demo's picture, its table, and what was not withstood, from results.json."""
    results = json.loads((RESULTS / "demo" / "results.json").read_text())
    lines = [
        "![What is forgotten, what is kept, what attacks bring back](benchmarks/results/demo/overview.png)",
        "",
        f"`{results['command']}`. {results['world']} Shares of held-out paraphrased questions:",
        "",
        "| | " + " | ".join(COLUMNS.values()) + " | s |",
        "|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for row in results["rows"]:
        cells = [f"{row[column]:.2f}" for column in COLUMNS]
        lines.append(f"| `{row['method']}` | " + " | ".join(cells) + f" | {row['seconds']:.0f} |")
    lines += ["", *(f"* `{method}`: {about}" for method, about in results["methods"].items())]
    lines += ["", "**Not withstood here** (above 10 %):", ""]
    lines += [f"* {sentence}" for sentence in results["not_withstood"]] or ["* nothing"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines += ["", f"Seed {results['seed']}, {results['total_seconds']:.0f} s in all; {versions}."]
    return "\n".join(lines)


def bench_block() -> str:
    """For every device: one table of the largest cases, the figures of what grows, and where all numbers are."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob("*/bench.jsonl")):
        rows = read_rows(path)
        folder = path.parent.relative_to(ROOT)
        command = "make bench-cpu" if path.parent.name == "cpu" else "make gpu"
        more = [(_gate(path.parent), "gate.md"), ("targets", "targets.md"), ("kernels", "kernels.md")]
        links = [("all numbers", "bench.md"), *(link for link in more if (path.parent / link[1]).exists())]
        said = f"{report.where(rows)}; `{command}`, {', '.join(f'[{text}]({folder}/{name})' for text, name in links)}."
        lines += [said, "", *report.summary(rows), ""]
        lines += [f"![{figure.stem}: time and memory]({folder}/{figure.name})" for figure in _figures(path)]
        lines.append("")
    return "\n".join(lines).strip()


def _gate(folder: pathlib.Path) -> str:
    """How many checks of the device's gate there are of each colour."""
    path = folder / "gate.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    counts = collections.Counter(row["status"] for row in rows)
    return f"{counts['green']} of {len(rows)} checks green, {counts['red']} red, {counts['not run']} not run"


def _figures(path: pathlib.Path) -> list[pathlib.Path]:
    """The first screen shows one figure of a device: the top-k loss where it was swept."""
    return sorted(path.parent.glob("topk_distill_loss_*.png"))[:1]


BLOCKS = {
    "cpu": lambda: (RESULTS / "cpu" / "goals.md").read_text().strip(),
    "demo": demo_block,
    "bench": bench_block,
}


def filled(text: str) -> str:
    """The README's text with every block made anew."""
    for name, block in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README.md: wanted one block {name!r}, got {len(pattern.findall(text))}")
        made = block()
        text = pattern.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=pathlib.Path, help="a demo_report folder to take results from first")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.demo is not None:
        (RESULTS / "demo").mkdir(parents=True, exist_ok=True)
        for name in KEPT_OF_DEMO:
            shutil.copyfile(arguments.demo / name, RESULTS / "demo" / name)
    before = README.read_text()
    after = filled(before)
    if arguments.check:
        print("README.md agrees with the results" if before == after else "README.md is stale: make readme")
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
