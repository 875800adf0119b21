"""The console script `duet`: parses, calls, and turns expected errors into one line."""

import io
import json
import platform
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Argument, Context, Exit, Option, Typer
from typer.core import TyperCommand

from duet.evaluation.commands import (
    BatchSize,
    Device,
    Dtype,
    Limit,
    Model,
    check_one_process,
    lines_of,
    literal_console,
    names_in,
    numbers_in,
    progress,
    resumable,
    run_attack,
    run_eval,
    run_report,
)
from duet.extras import MissingExtra, missing, version_of

Run = Annotated[Path, Option(help="YAML file of the run that `duet train` will get")]
MaxNewTokens = Annotated[int, Option(min=1, help="of an answer")]
_KEYS = {"allow_extra_args": True, "ignore_unknown_options": True}  # keys of the YAML file follow as options
_shown = {"traceback": False}
app = Typer(no_args_is_help=True, pretty_exceptions_enable=False)
console = literal_console()


def say(text: str) -> None:
    """Prints a line, however long: the terminal breaks it."""
    console.print(text, soft_wrap=True)


class WithKeys(TyperCommand):
    """A command whose `--help` lists the keys of the YAML file too."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from duet.run.keys import groups

        for title, keys in groups().items():
            console.print(Text(f"\n{title}", style="bold"))
            if "transformers" in title:  # a hundred keys, explained in transformers' documentation
                console.print(Text(" ".join(keys)))
                continue
            table = Table.grid(padding=(0, 2))
            for key, (default, about) in keys.items():
                table.add_row(f"--{key}", Text.assemble(about, " " * bool(about), (f"[{default}]", "dim")))
            console.print(table)


def _own(context: Any) -> list[str]:
    """Names of the command's own options, without their dashes."""
    return [name[2:] for each in context.command.params for name in each.opts if name.startswith("--")]


def _say_version(wanted: bool) -> None:
    if wanted:
        console.print(f"duet-kernels {version_of('duet-kernels') or 'not installed'}")
        raise Exit


@app.callback()
def _describe(
    version: Annotated[
        bool, Option("--version", help="print the version", callback=_say_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, Option("--debug", help="before the command: show where in the code an error arose")
    ] = False,
) -> None:
    """Distilled LLM unlearning: a model learns to behave as if it had been told to forget."""
    _shown["traceback"] = debug


@app.command()
def demo(
    out: Annotated[Path, Option(help="folder for results.json, report.md, plots and the model")] = Path(
        "demo_report"
    ),
    quick: Annotated[bool, Option("--quick", help="fewer methods and questions, about a minute")] = False,
    seed: Annotated[
        int, Option(min=0, help="of the unlearning; with --rebuild of the world and its base model")
    ] = 0,
    rebuild: Annotated[
        bool,
        Option(
            "--rebuild", help="train the tiny base model anew, report its quality and stop (several minutes)"
        ),
    ] = False,
    checkpoint: Annotated[
        Path | None,
        Option(help="another base model: where --rebuild writes it, else which one forgets"),
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


@app.command(cls=WithKeys, context_settings=_KEYS)
def train(
    overrides: Context,
    config: Annotated[Path, Option(help="YAML file of the run; examples are in configs/")],
    resume: Annotated[
        bool,
        Option("--resume", help="go on from the last finished checkpoint in output_dir, if there is one"),
    ] = False,
    anyway: Annotated[
        bool, Option("--anyway", help="train even where the steered teacher does not forget")
    ] = False,
) -> None:
    """Make a language model forget what a YAML file says. Any key of it can follow: --learning_rate 1e-4 --adapter.r 8."""
    from duet.run.config_file import RunConfig

    # What is wrong in it is said before the rest is imported.
    run = RunConfig.load(config, overrides.args, _own(overrides))
    from duet.run.commands import how_to_go_on
    from duet.run.commands import train as run_training

    def check(trainer: Any) -> None:
        if without := missing("eval"):
            said: str | None = f"the steered teacher was not measured: {without}"
        else:
            from duet.run.steer import preflight

            said = preflight(run, trainer, anyway)
        if said and trainer.is_world_process_zero():
            say(said)

    try:
        trainer = run_training(run, resume, check)
    except KeyboardInterrupt:
        if not run.training.process_index:
            say(how_to_go_on(str(run.training.output_dir)))
        raise SystemExit(130) from None
    if trainer.is_world_process_zero():
        out = str(run.training.output_dir)
        merged = f", merged with its base: {Path(out, 'merged')}" if run.merge else ""
        say(f"{out}: the model after {trainer.state.global_step} steps{merged}")
        say(f"what it still says: duet eval {shlex.quote(out)} --suite probes --data DIR --out DIR")


@app.command(context_settings=_KEYS)
def steer(
    overrides: Context,
    config: Run,
    data: Annotated[
        Path | None,
        Option(
            help="the --out of duet elicit: its training and validation rows choose, its report rows measure"
        ),
    ] = None,
    wordings: Annotated[
        Path | None,
        Option(help="file with steering prefixes, one a line; default: the run's and five of ours"),
    ] = None,
    places: Annotated[
        str, Option(help="where the prefix is tried: system, user or system,user")
    ] = "system,user",
    limit: Annotated[int, Option(min=1, help="rows of each kind to choose by, and as many to measure")] = 16,
    max_new_tokens: MaxNewTokens = 48,
    write: Annotated[
        Path | None, Option(help="new YAML file: the run with the chosen wording and place")
    ] = None,
    anyway: Annotated[bool, Option("--anyway", help="write even a steering that does not forget")] = False,
) -> None:
    """Which steering prefix makes the model forget, and little else, before anything is trained."""
    from duet.run.config_file import RunConfig, apply_overrides, read_run

    tree = apply_overrides(read_run(config), overrides.args, _own(overrides))
    run = RunConfig.of(tree)
    chosen_places = list(dict.fromkeys(place.strip() for place in places.split(",")))
    texts = () if wordings is None else lines_of(wordings, "wordings")
    from duet.run import steer as steering

    if write is not None:
        steering.check_new(write)
    with progress(console) as shown:
        how: dict[str, Any] = {"folder": data, "limit": limit, "max_new_tokens": max_new_tokens}
        chosen = steering.steer(run, texts, chosen_places, progress=shown, **how)
    console.print(steering.table(chosen))
    for text, letter in steering.wording_names(chosen).items():
        say(f"{letter}: {text}")
    say(steering.verdict(chosen))
    if write is not None:
        steering.write_choice(write, tree, chosen, anyway)
        say(f"written to {write}")


@app.command()
def elicit(
    model: Model,
    subject: Annotated[str, Option(help="what is to be forgotten; several with commas between them")],
    out: Annotated[
        Path,
        Option(help="folder for forget.jsonl, neighbour.jsonl, retain.jsonl; continued if it is there"),
    ],
    questions: Annotated[
        Path | None,
        Option(help="file of questions: question, and perhaps paraphrases, subject, value"),
    ] = None,
    source: Annotated[
        str | None,
        Option(help="facts of packages: capitals, currencies, languages, elements; commas between them"),
    ] = None,
    neighbours: Annotated[
        str | None,
        Option(
            help="others that questions with {subject} are asked about, such as Spain,Italy; a source has its own"
        ),
    ] = None,
    samples: Annotated[int, Option(min=0, help="drawn answers to each wording, beside the greedy one")] = 4,
    max_new_tokens: MaxNewTokens = 64,
    seed: Annotated[int, Option(min=0, help="of the drawn answers")] = 0,
    limit: Limit = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Ask a model what it knows of a subject, and write what it tells as rows to forget and to keep."""
    from duet.data.prompts import Prompting
    from duet.data.sources import read_table
    from duet.evaluation import elicit, facts, models
    from duet.evaluation.fact_sources import source_rows

    check_one_process("elicit")
    if questions is None and source is None:
        raise ValueError("questions: wanted --questions, --source or both, got neither")
    if questions is not None and not questions.is_file():
        raise FileNotFoundError(f"questions: there is no file {str(questions)!r}")
    wanted, others, sources = (names_in(text or "") for text in (subject, neighbours, source))
    rows = [] if questions is None else read_table(questions, "questions", limit)
    asked = facts.facts_of([*rows, *source_rows(sources, wanted, others)], wanted, others)
    base, tokenizer = models.load(model, dtype, device)
    if not tokenizer.chat_template:
        say("the tokenizer has no chat template: questions are written as plain text")
    how: dict[str, Any] = {
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "batch_size": batch_size,
    }
    with resumable(out, console), progress(console) as shown:
        prompting = Prompting.of(model)
        counts = elicit.elicit_facts(
            base, tokenizer, asked, out, prompting=prompting, name=model, progress=shown, **how
        )
    table = Table(
        "", "facts asked", "told", *(f"rows: {split}" for split in elicit.SPLITS), title=f"what {model} tells"
    )
    for kind, count in counts.items():
        table.add_row(kind, *map(str, count.values()))
    console.print(table)
    if kept := facts.neighbours_in(asked):
        say(kept)
    if counts["forget"]["report"]:
        coming = f"duet steer --data {shlex.quote(str(out))} --config FILE comes next"
    else:  # nothing would be left to measure by
        coming = "duet steer --config FILE comes next, with these rows in its data; --data needs three wordings of a question"
    say(f"written to {out}: {coming}")


@app.command()
def shrink(
    adapter: Annotated[Path, Argument(help="folder with a trained LoRA adapter")],
    data: Annotated[
        Path,
        Option(
            help="folder with forget.jsonl and retain.jsonl in other wordings than training's: validation of duet elicit"
        ),
    ],
    out: Annotated[Path, Option(help="new folder for the adapter at the chosen size")],
    sizes: Annotated[
        str, Option(help="what the adapter is multiplied by; 1 is tried in any case")
    ] = "1,0.9,0.8,0.7,0.6,0.5",
    most: Annotated[float, Option(help="share of the forget rows that may come back")] = 0.1,
    samples: Annotated[int, Option(min=1, help="drawn answers to each forget row")] = 16,
    max_new_tokens: MaxNewTokens = 48,
    limit: Limit = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Make a trained adapter smaller, if the model then keeps more and still forgets."""
    from duet.run import shrink as shrinking

    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "samples": samples}
    how |= {"limit": limit, "dtype": dtype, "device": device}
    tried = numbers_in(sizes, float, "sizes")
    with progress(console) as shown:
        found = shrinking.run_shrink(adapter, data, out, sizes=tried, most=most, progress=shown, **how)
    console.print(shrinking.table(found))
    say(shrinking.verdict(found))
    say(f"written to {out}")


@app.command("import")
def import_(
    path: Annotated[Path, Argument(help="file or folder of the benchmark or run")],
    kind: Annotated[str, Option(help="rwku, openunlearning (a run's folder) or choices (WMDP, MMLU)")],
    out: Annotated[Path, Option(help="folder for forget.jsonl, retain.jsonl and others")],
    role: Annotated[
        str, Option(help="of the questions of choices: forget (WMDP) or retain (MMLU)")
    ] = "forget",
    subject: Annotated[
        str | None,
        Option(help="of rows to forget that name none; a steering prefix with {subject} needs one"),
    ] = None,
) -> None:
    """Turn files of other benchmarks and frameworks into rows that duet eval and duet attack read."""
    from duet.data.importers import OPEN, import_rows, write_rows

    found = import_rows(path, kind, role, subject)
    for written in write_rows(found, out):
        say(f"written to {written}")
    for name, value in found.numbers.items():
        say(f"{name}: {value:.6g} (as the run reports it)")
    tables = {"forget": OPEN if OPEN in found.tables else "forget", "retain": "retain"}
    kinds = {name: out / f"{of}.jsonl" for name, of in tables.items() if of in found.tables}
    files = " ".join(f"--{name} {shlex.quote(str(file))}" for name, file in kinds.items())
    if "forget" in found.tables:
        model = shlex.quote(str(found.model or "MODEL"))
        say(f"duet attack {model} {files} --out attack comes next")
    if "choices" in found.tables:
        task = {"forget": "wmdp_bio", "retain": "mmlu"}[role]
        words = f"--suite mcq --data {shlex.quote(str(out))} --set {task}=choices --out choices"
        say(f"duet eval MODEL {words} asks for the letter")


@app.command()
def chat(
    model: Model,
    beside: Annotated[str | None, Option(help="a second model, such as the one before unlearning")] = None,
    max_new_tokens: MaxNewTokens = 128,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Ask a model, line by line from the standard input; with --beside two, whose answers stand side by side."""
    from duet.data.prompts import Prompting
    from duet.evaluation import models
    from duet.evaluation.chat import Speaker
    from duet.evaluation.chat import chat as talk

    if sys.stdin is None:
        raise ValueError("chat: wanted questions from the standard input, got one that is closed")
    names = [model] if beside is None else [model, beside]
    saved = [Prompting.saved_with(name) for name in names]
    usual = next(filter(None, saved), Prompting())  # a base is asked as the model that was trained from it
    speakers = [
        Speaker(name, *models.load(name, dtype, device), own or usual, max_new_tokens)
        for name, own in zip(names, saved, strict=True)
    ]
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes of another encoding become the replacement character
    if sys.stdin.isatty():
        console.print("a question a line; Ctrl-D ends")
    with suppress(KeyboardInterrupt):
        talk(sys.stdin, speakers, console)


@app.command(context_settings=_KEYS)
def cache(
    overrides: Context,
    config: Run,
    out: Annotated[Path | None, Option(help="folder of the store; default: training.teacher_store")] = None,
    dtype: Annotated[str, Option(help="of stored logits: float32, bfloat16 or float16")] = "float32",
) -> None:
    """Ask the teacher once and keep its top-k logits: `duet train` then runs without one. Started again, it continues."""
    from duet.run.config_file import RunConfig, quoted

    chosen = [] if out is None else ["--training.teacher_store", quoted(str(out))]
    run = RunConfig.load(config, [*overrides.args, *chosen], _own(overrides))
    from duet.run.commands import cache as run_caching

    done = run_caching(run, dtype)
    if run.training.process_index == 0:
        say(f"{done.store.folder}: {len(done.store)} entries, {done.added} of them new; {done.saving}")


@app.command(context_settings=_KEYS)
def plan(
    overrides: Context,
    model: Annotated[str | None, Option(help="name or folder of the model; only its config is read")] = None,
    config: Annotated[Path | None, Option(help="YAML file of a run; default: LoRA on bf16")] = None,
    gpu_memory: Annotated[str, Option(help="such as 24GiB; a number alone is GiB")] = "24GiB",
    length: Annotated[int, Option(min=1, help="tokens of the longest query with its answer")] = 256,
    prefix_length: Annotated[int, Option(min=0, help="tokens that the steering prefix adds")] = 128,
    scored: Annotated[
        int | None,
        Option(
            min=1,
            help="scored positions a query, such as the tokens of the longest answer; default: what the method may score",
        ),
    ] = None,
    subjects: Annotated[int, Option(min=1, help="how many people or things are to be forgotten")] = 1,
    reserve: Annotated[str, Option(help="kept free for the CUDA context and fragmentation")] = "1GiB",
    as_json: Annotated[bool, Option("--json", help="print JSON, sizes in bytes")] = False,
) -> None:
    """Where the memory of a training step will go, and which settings fit, before anything is loaded."""
    from duet.run.config_file import apply_overrides, quoted, read_run
    from duet.run.plan_report import DEFAULT_TREE, Plan, parse_size

    if model is None and config is None:
        raise ValueError("plan: wanted --model or --config, got neither")
    chosen = [] if model is None else ["--model", quoted(model)]
    written = DEFAULT_TREE if config is None else read_run(config)
    tree = apply_overrides(written, [*chosen, *overrides.args], _own(overrides))
    memory, free = parse_size(gpu_memory), parse_size(reserve, "reserve")
    made = Plan.of(tree, memory, length, prefix_length, scored, free, subjects)
    if as_json:
        print(json.dumps(made.as_dict()))
    else:
        for table in made.tables():
            console.print(table)


@app.command()
def schema() -> None:
    """Print a JSON schema of the YAML file of a run, with which an editor checks and completes it."""
    from duet.run.schema import schema as of_run

    print(json.dumps(of_run(), indent=2))


@app.command()
def merge(
    adapter: Annotated[Path, Argument(help="folder with a trained adapter")],
    out: Annotated[Path, Option(help="folder for the merged model and its tokenizer")],
    dtype: Annotated[
        str,
        Option(
            help="auto (as the adapter was trained), float32, bfloat16 or float16, which may round it away"
        ),
    ] = "auto",
) -> None:
    """Add a trained adapter to its base model and save a model that needs no peft."""
    from duet.run.commands import merge_adapter

    merge_adapter(adapter, out, dtype)
    say(f"{out}: the merged model and its tokenizer")


app.command(name="eval")(run_eval)
app.command(name="attack")(run_attack)
app.command(name="report")(run_report)


@app.command()
def env() -> None:
    """Versions, devices, and which implementation runs each operation, and why."""
    import torch

    import duet_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    console.print(f"python {platform.python_version()} on {platform.platform()}")
    console.print(f"device {device}: {name}, {torch.get_num_threads()} threads")
    packages = "duet-kernels torch triton transformers peft accelerate datasets flash-attn bitsandbytes"
    console.print("  ".join(f"{package} {version_of(package) or 'absent'}" for package in packages.split()))
    rows, workspace = duet_kernels.dispatch.described(device)
    title = f"duet_kernels on {device}, impl='auto', bf16"
    table = Table("operation", "implementation", "because", title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"workspace: a call may use {workspace / 2**20:.0f} MiB beyond its inputs and outputs")


# Faults of the input or the machine. So is a TypeError or RuntimeError whose message begins with "name: "; any other is a fault of duet.
_EXPECTED = (ValueError, OSError, MissingExtra)
# Arguments of DuetTrainer, which the user of a command did not give -> their keys in the YAML file.
_KEY_OF = {
    "forget_dataset": "data.forget",
    "retain_dataset": "data.retain",
    "eval_dataset": "data.eval",
    "processing_class": "tokenizer",
}


def main() -> None:
    """Run the command line; an error is one line, and a traceback only with `duet --debug COMMAND`.

    Exit status 2: the input, or the machine; 1: something that we did not expect.
    """
    _shown["traceback"] = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what its encoding does not have becomes "?"
    try:
        app()
    except Exception as error:
        if _shown["traceback"]:
            raise
        named = isinstance(error, _EXPECTED) or (
            isinstance(error, (TypeError, RuntimeError)) and ": " in str(error)
        )
        # A package that an option of another library needs: flash-attn, deepspeed.
        named = named or (isinstance(error, ImportError) and not (error.name or "").startswith("duet"))
        words = (
            str(error)
            if named
            else f"{type(error).__name__}: {error} (not expected; `duet --debug ...` shows where)"
        )
        words = re.sub(r"\b\w+(?=[:\[])", lambda word: _KEY_OF.get(word[0], word[0]), words)
        text = Text.assemble(("error", "bold red"), f": {words}")
        literal_console(stderr=True).print(text, soft_wrap=True)  # a line is broken by the terminal
        raise SystemExit(2 if named else 1) from None


if __name__ == "__main__":
    main()
