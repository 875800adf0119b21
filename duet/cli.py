"""The console script `duet`. Parses, calls, and turns expected errors into one line; nobody imports this room."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.callback()
def _describe() -> None:
    """Distilled LLM unlearning: a model learns to behave as if it had been told to forget."""


@app.command()
def demo(
    out: Annotated[
        pathlib.Path, typer.Option(help="folder for results.json, report.md, plots and the model")
    ] = (pathlib.Path("demo_report")),
    quick: Annotated[bool, typer.Option("--quick", help="fewer probes, under a minute")] = False,
    seed: Annotated[
        int, typer.Option(help="of the unlearning; with --rebuild of the world and its base model")
    ] = 0,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild", help="train the tiny base model anew, report its quality and stop (several minutes)"
        ),
    ] = False,
    checkpoint: Annotated[
        pathlib.Path | None,
        typer.Option(help="another base model: where --rebuild writes it, else which one forgets"),
    ] = None,
) -> None:
    """Make a tiny language model forget ten people, and see what it still gives away."""
    from duet.world.checkpoint import CHECKPOINT

    if rebuild:
        from duet.world.pretrain import rebuild as rebuild_base

        rebuild_base(seed=seed, out=checkpoint or CHECKPOINT)
        return
    from duet.world.demo import run_demo

    run_demo(out_dir=out, quick=quick, seed=seed, checkpoint=checkpoint or CHECKPOINT)


@app.command()
def env() -> None:
    """Versions, devices, and which implementation runs each operation, and why."""
    import torch

    import duet_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    console.print(f"python {platform.python_version()} on {platform.platform()}")
    console.print(f"device {device}: {name}, {torch.get_num_threads()} threads")
    packages = (
        "duet-kernels",
        "torch",
        "triton",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "flash-attn",
    )
    console.print("  ".join(f"{package} {_version(package)}" for package in (*packages, "bitsandbytes")))
    table = Table("operation", "implementation", "because", title=f"duet_kernels on {device}, impl='auto'")
    ops = [name for name in duet_kernels.__all__ if name.startswith(("linear_", "topk_"))]
    for op in [*ops, "topk_distill_loss/lse"]:
        table.add_row(op, *duet_kernels.resolve_impl(op, device))
    console.print(table)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def main() -> None:
    """Run the command line; an expected error is one line and exit status 2, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error[/]: {error}", highlight=False)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
