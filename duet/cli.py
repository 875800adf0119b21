"""The console script `duet`. Parses, calls, and turns expected errors into one line; nobody imports this room."""

from __future__ import annotations

import importlib.metadata
import logging
import pathlib
import platform
import warnings
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from duet.evaluation.commands import literal_console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = literal_console()


def _say_version(wanted: bool) -> None:
    if wanted:
        console.print(f"duet-kernels {_version('duet-kernels')}")
        raise typer.Exit


@app.callback()
def _describe(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Distilled LLM unlearning: a model learns to behave as if it had been told to forget."""


@app.command()
def demo(
    out: Annotated[
        pathlib.Path, typer.Option(help="folder for results.json, report.md, plots and the model")
    ] = (pathlib.Path("demo_report")),
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer methods and questions, about a minute")
    ] = False,
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
    from duet.demo.checkpoint import CHECKPOINT

    if rebuild:
        from duet.demo.pretrain import rebuild as rebuild_base

        rebuild_base(seed=seed, out=checkpoint or CHECKPOINT)
        return
    from duet.demo.tour import run_demo

    run_demo(out_dir=out, quick=quick, seed=seed, checkpoint=checkpoint or CHECKPOINT)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    overrides: typer.Context,
    config: Annotated[pathlib.Path, typer.Option(help="YAML file of the run; examples are in configs/")],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="go on from the last finished checkpoint in output_dir, if there is one"
        ),
    ] = False,
) -> None:
    """Make a language model forget what a YAML file says. Any key of it can follow: --learning_rate 1e-4 --adapter.r 8."""
    from duet.run.config_file import RunConfig

    run = RunConfig.load(config, overrides.args)  # what is wrong in it is said before the rest is imported
    from duet.run.commands import train as train_run

    trainer = train_run(run, resume)
    if trainer.is_world_process_zero():
        out = run.training.output_dir
        merged = f", merged with its base: {pathlib.Path(out, 'merged')}" if run.merge else ""
        console.print(f"{out}: the model after {trainer.state.global_step} steps{merged}", soft_wrap=True)
        console.print(
            f"what it still says: duet eval {out} --suite probes --data DIR --out DIR", soft_wrap=True
        )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def cache(
    overrides: typer.Context,
    config: Annotated[pathlib.Path, typer.Option(help="YAML file of the run that `duet train` will get")],
    out: Annotated[
        pathlib.Path | None, typer.Option(help="folder of the store; default: training.teacher_store")
    ] = None,
    dtype: Annotated[str, typer.Option(help="of stored logits: float32, bfloat16 or float16")] = "float32",
) -> None:
    """Ask the teacher once and keep its top-k logits: `duet train` then runs without one. Started again, it continues."""
    from duet.run.config_file import RunConfig

    chosen = [] if out is None else ["--training.teacher_store", str(out)]
    run = RunConfig.load(config, [*overrides.args, *chosen])
    from duet.run.commands import cache as cache_run

    done = cache_run(run, dtype)
    console.print(f"{done.store.folder}: {len(done.store)} entries, {done.added} of them new; {done.saving}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    overrides: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="name or folder of the model; only its config is read")
    ] = None,
    config: Annotated[
        pathlib.Path | None, typer.Option(help="YAML file of a run; default: LoRA on bf16")
    ] = None,
    gpu_memory: Annotated[str, typer.Option(help="such as 24GiB; a number alone is GiB")] = "24GiB",
    length: Annotated[int, typer.Option(min=1, help="tokens of the longest query with its answer")] = 256,
    prefix_length: Annotated[int, typer.Option(min=0, help="tokens that the steering prefix adds")] = 128,
    scored: Annotated[int, typer.Option(min=1, help="scored positions a query")] = 1,
    subjects: Annotated[int, typer.Option(min=1, help="how many people or things are to be forgotten")] = 1,
    reserve: Annotated[str, typer.Option(help="kept free for the CUDA context and fragmentation")] = "1GiB",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, sizes in bytes")] = False,
) -> None:
    """Where the memory of a training step will go, and which settings fit, before anything is loaded."""
    import json

    from duet.run.config_file import apply_overrides, read_run
    from duet.run.plan_report import DEFAULT_TREE, Plan, parse_size

    if model is None and config is None:
        raise ValueError("plan: wanted --model or --config, got neither")
    chosen = [] if model is None else ["--model.name", model]
    tree = apply_overrides(DEFAULT_TREE if config is None else read_run(config), [*chosen, *overrides.args])
    memory, free = parse_size(gpu_memory), parse_size(reserve, "reserve")
    found = Plan.of(tree, memory, length, prefix_length, scored, free, subjects)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        for table in found.tables():
            console.print(table)


@app.command()
def merge(
    adapter: Annotated[pathlib.Path, typer.Argument(help="folder with a trained adapter")],
    out: Annotated[pathlib.Path, typer.Option(help="folder for the merged model and its tokenizer")],
) -> None:
    """Add a trained adapter to its base model and save a model that needs no peft."""
    from duet.run.commands import merge_adapter

    merge_adapter(adapter, out)
    console.print(f"{out}: the merged model and its tokenizer", soft_wrap=True)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="folder or name of a model, or folder of an adapter")],
    out: Annotated[
        pathlib.Path, typer.Option(help="folder for rows.jsonl and summary.json; continued if it is there")
    ],
    suite: Annotated[
        str | None, typer.Option(help="tofu, muse, mcq, probes, or a .yaml file of your own")
    ] = None,
    data: Annotated[
        pathlib.Path | None,
        typer.Option(help="folder with the suite's files; without it they come from the Hub"),
    ] = None,
    retain_run: Annotated[
        pathlib.Path | None,
        typer.Option(help="the --out of a model trained without the forget rows: forget quality needs it"),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="an option of the suite, such as split=forget05")
    ] = None,
    steering: Annotated[
        str | None,
        typer.Option(help="said before every question, {subject} for what should go: the steered teacher"),
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="tasks of lm-evaluation-harness, such as mmlu,wmdp_bio")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="only so many first rows of each task")] = None,
    batch_size: Annotated[int, typer.Option(help="sequences at once")] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str | None, typer.Option(help="such as cuda:1; the GPU if there is one")] = None,
) -> None:
    """What a model still says, knows and can do: a suite of questions, row by row, resumable."""
    from duet.evaluation.commands import run_eval

    run_eval(
        model,
        suite=suite,
        out=out,
        data=data,
        retain_run=retain_run,
        settings=settings or (),
        steering=steering,
        lm_eval=lm_eval,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        console=console,
    )


@app.command()
def attack(
    model: Annotated[str, typer.Argument(help="folder or name of a model, or folder of an adapter")],
    forget: Annotated[str, typer.Option(help="file with question and answer; value and paraphrases help")],
    out: Annotated[
        pathlib.Path, typer.Option(help="folder for attacks.json and rows.jsonl; continued if it is there")
    ],
    retain: Annotated[
        str | None, typer.Option(help="rows that may be known: examples and benign training")
    ] = None,
    holdout: Annotated[str | None, typer.Option(help="rows never trained on: membership inference")] = None,
    base: Annotated[
        str | None, typer.Option(help="the model before unlearning, for comparison (both are in memory)")
    ] = None,
    attacks: Annotated[str | None, typer.Option(help="only these, such as prefill,relearning")] = None,
    reverse_prompts: Annotated[
        pathlib.Path | None, typer.Option(help="file with the override wordings used in training, one a line")
    ] = None,
    relearn_rates: Annotated[str | None, typer.Option(help="learning rates, such as 1e-5,1e-4,1e-3")] = None,
    relearn_steps: Annotated[
        str | None, typer.Option(help="recall is measured after these, such as 10,100,500")
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="ROUGE-L recall that counts, for rows without a value")
    ] = 0.5,
    max_new_tokens: Annotated[int, typer.Option(help="of an answer")] = 64,
    limit: Annotated[int | None, typer.Option(help="only so many first rows")] = None,
    batch_size: Annotated[int, typer.Option(help="sequences at once")] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str | None, typer.Option(help="such as cuda:1; the GPU if there is one")] = None,
) -> None:
    """Try to bring back what was forgotten, by prompts and by changing the weights; the worst attack comes first."""
    from duet.evaluation.commands import run_attack

    run_attack(
        model,
        forget=forget,
        out=out,
        retain=retain,
        holdout=holdout,
        base=base,
        attacks=attacks,
        reverse_prompts=reverse_prompts,
        relearn_rates=relearn_rates,
        relearn_steps=relearn_steps,
        threshold=threshold,
        max_new_tokens=max_new_tokens,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        console=console,
    )


@app.command()
def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="folders that eval, attack, train or demo wrote, or folders of such; label=folder names the method"
        ),
    ] = None,
    out: Annotated[pathlib.Path, typer.Option(help="folder for report.html, report.md and figures")] = (
        pathlib.Path("report")
    ),
    base: Annotated[list[str] | None, typer.Option(help="run of the model before unlearning")] = None,
    teacher: Annotated[list[str] | None, typer.Option(help="run of the base steered in context")] = None,
    forget_metric: Annotated[
        str | None, typer.Option(help="task.metric, the frontier's horizontal axis")
    ] = None,
    retain_metric: Annotated[str | None, typer.Option(help="task.metric, its vertical axis")] = None,
    examples: Annotated[int, typer.Option(help="questions shown per task")] = 6,
    model_before: Annotated[
        str | None, typer.Option(help="model whose logits are compared, before unlearning")
    ] = None,
    model_after: Annotated[str | None, typer.Option(help="the same model after it")] = None,
    query: Annotated[list[str] | None, typer.Option(help="a question for both")] = None,
    top_k: Annotated[int, typer.Option(help="logits of each of them")] = 8,
    steering: Annotated[
        str | None, typer.Option(help="prefix behind which the model before is the teacher")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str | None, typer.Option(help="such as cuda:1; the GPU if there is one")] = None,
) -> None:
    """Everything that was measured, on one page: the table, answers side by side, frontier, relearning, logits."""
    from duet.evaluation.report.report import write_report, write_topk

    topk = []
    if model_before or model_after or query:
        told = write_topk(
            model_before,
            model_after,
            query or (),
            out,
            k=top_k,
            steering=steering,
            dtype=dtype,
            device=device,
        )
        topk.append(told)
    page = write_report(
        runs or (),
        out,
        base=base or (),
        teacher=teacher or (),
        forget_metric=forget_metric,
        retain_metric=retain_metric,
        examples=examples,
        topk=topk,
    )
    console.print(f"written to {page} and {page.with_suffix('.md')}")


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
    rows, workspace = duet_kernels.dispatch.described(device)
    title = f"duet_kernels on {device}, impl='auto', bf16"
    table = Table("operation", "implementation", "because", title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"workspace: a call may use {workspace / 2**20:.0f} MiB beyond its inputs and outputs")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _silence_what_no_user_can_change() -> None:
    """Words of other libraries about themselves, on every command."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional faster kernel
    warnings.filterwarnings(
        "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
    )  # peft asks for it


def main() -> None:
    """Run the command line; an expected error is one line and exit status 2, not a traceback."""
    _silence_what_no_user_can_change()
    try:
        app()
    except (ValueError, OSError, TypeError) as error:
        if isinstance(error, TypeError) and "wanted" not in str(error):
            raise  # a mistake of ours, not of the input
        text = Text.assemble(("error", "bold red"), f": {error}")
        literal_console(stderr=True).print(text, soft_wrap=True)  # a line is broken by the terminal
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
