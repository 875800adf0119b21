"""Every number of README.md and docs/ comes from here: `python -m benchmarks.readme` fills their marked blocks from results.

    goals           benchmarks/results/cpu/goals.md                made by `make bench`
    cpu, gpu, fast, workspace, elsewhere
                    benchmarks/results/*/{bench,gate}.jsonl        made by `make bench-cpu`, `make gpu`
    demo, tour      benchmarks/results/demo/results.json           taken over from demo_report/ with --demo DIR
    real            benchmarks/results/real/results.jsonl          made by `make study-real`

`--check` writes nothing and exits 1 when a page says something else than the results.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
import shutil
import sys
from typing import Any

from benchmarks import report
from benchmarks.harness import Row, read_rows
from benchmarks.studies.real.job import read_report
from benchmarks.studies.real.page import summary

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
    """The demo's picture and its table, from results.json."""
    results = _demo()
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
    return "\n".join(lines)


def tour_block() -> str:
    """What `demo_block` shows, what the methods are, what was not withstood, and with what it was made."""
    results = _demo()
    lines = [demo_block(), "", *(f"* `{method}`: {about}" for method, about in results["methods"].items())]
    lines += ["", "**Not withstood here** (above 10 %):", ""]
    lines += [f"* {sentence}" for sentence in results["not_withstood"]] or ["* nothing"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines += ["", f"Seed {results['seed']}, {results['total_seconds']:.0f} s in all; {versions}."]
    return "\n".join(lines)


def _demo() -> dict[str, Any]:
    return json.loads((RESULTS / "demo" / "results.json").read_text())


def real_block() -> str:
    """The main methods on a pretrained model."""
    return "\n".join(summary(read_report(RESULTS / "real")))


# The rows of a short table.
SHORT = (
    "`linear_topk`",
    "`topk_distill_loss` huber, frozen head, forward",
    "`topk_distill_loss` huber, trainable head, forward",
    "`topk_distill_loss` forward_kl/tail, frozen head",
    "`linear_distill_loss` forward_kl, frozen head",
    "`linear_cross_entropy`, frozen head",
    "`linear_token_stats`",
)


def device_block(on_cpu: bool, short: bool = False) -> str:
    """For every device: one table of the largest cases, the figures of what grows, and where all numbers are."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob("*/bench.jsonl")):
        if (path.parent.name == "cpu") != on_cpu:
            continue
        rows = read_rows(path)
        folder = path.parent.relative_to(ROOT)
        command = "make bench-cpu" if on_cpu else "make gpu"
        more = [(_gate(path.parent), "gate.md"), ("targets", "targets.md"), ("kernels", "kernels.md")]
        links = [("all numbers", "bench.md"), *(link for link in more if (path.parent / link[1]).exists())]
        said = f"{report.where(rows)}; `{command}`, {', '.join(f'[{text}]({folder}/{name})' for text, name in links)}."
        head, rule, *table = report.summary(rows)
        table = [row for row in table if not short or row.startswith(tuple(f"| {name}" for name in SHORT))]
        at = report.measured_at(rows)
        if short:  # README.md counts its lines
            said, at = " ".join([said, *at[1:]]), []
        lines += [said, "", head, rule, *table, *at, ""]
        lines += [f"![{figure.stem}: time and memory]({folder}/{figure.name})" for figure in _figures(path)]
        lines.append("")
    return "\n".join(lines).strip()


def workspace_block() -> str:
    """What a smaller workspace costs, on every device where several were measured."""
    found = [(rows, report.workspaces(rows)) for rows in _devices()]
    return "\n\n".join(f"{report.place(rows)}:\n\n" + "\n".join(table) for rows, table in found if table)


def elsewhere_block() -> str:
    """Who is the better choice, on every device."""
    found = [(rows, report.better_elsewhere(rows)) for rows in _devices()]
    return "\n\n".join(f"{report.place(rows)}:\n\n" + "\n".join(table) for rows, table in found if table)


def _devices() -> list[list[Row]]:
    """The rows of every device, CPUs last."""
    paths = sorted(RESULTS.glob("*/bench.jsonl"), key=lambda path: (path.parent.name == "cpu", path))
    return [read_rows(path) for path in paths]


def _gate(folder: pathlib.Path) -> str:
    """How many checks of the device's gate there are of each colour."""
    path = folder / "gate.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    counts = collections.Counter(row["status"] for row in rows)
    return f"{counts['green']} of {len(rows)} checks green, {counts['red']} red, {counts['not run']} not run"


def _figures(path: pathlib.Path) -> list[pathlib.Path]:
    """One figure of a device is shown: the top-k loss where it was swept."""
    return sorted(path.parent.glob("topk_distill_loss_*.png"))[:1]


BLOCKS = {
    "goals": lambda: (RESULTS / "cpu" / "goals.md").read_text().strip(),
    "demo": demo_block,
    "tour": tour_block,
    "real": real_block,
    "cpu": lambda: device_block(on_cpu=True),
    "gpu": lambda: device_block(on_cpu=False),
    "workspace": workspace_block,
    "elsewhere": elsewhere_block,
    "fast": lambda: device_block(on_cpu=False, short=True),
}
PAGES = {
    README: ("demo", "real", "fast"),
    ROOT / "docs" / "demo.md": ("tour",),
    ROOT / "docs" / "performance.md": ("gpu", "goals", "cpu", "elsewhere", "workspace"),
}


def filled(page: pathlib.Path, text: str) -> str:
    """The text of a page with every block made anew, whose links begin at the root of the repository."""
    up = "../" * len(page.parent.relative_to(ROOT).parts)
    for name in PAGES[page]:
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{page.name}: wanted one block {name!r}, got {len(pattern.findall(text))}")
        made = BLOCKS[name]().replace("](", f"]({up}")
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
        if arguments.check:
            parser.error("--check changes no file; leave out --demo, which copies results")
        if json.loads((arguments.demo / "results.json").read_text())["quick"]:
            parser.error(
                f"--demo: {arguments.demo} was made by a quick demo, whose numbers are not for citing"
            )
        (RESULTS / "demo").mkdir(parents=True, exist_ok=True)
        for name in KEPT_OF_DEMO:
            shutil.copyfile(arguments.demo / name, RESULTS / "demo" / name)
    stale = {}
    for page in PAGES:
        before = page.read_text()
        after = filled(page, before)
        if after != before:
            stale[page] = after
    if arguments.check:
        print(
            "\n".join(f"{page.relative_to(ROOT)} is stale: make readme" for page in stale)
            or "all pages agree with the results"
        )
        return int(bool(stale))
    for page, text in stale.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
