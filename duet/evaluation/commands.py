"""What `duet eval`, `duet attack` and `duet report` do: load, run with a progress display, show a table.

The console takes texts as they are, so that a path or a question with [brackets] is printed whole.
"""

import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from typer import Argument, Option

from ..folders import disk_named

_SILENCE = 60.0  # seconds
LM_EVAL_TASKS = Path(__file__).parent / "suites" / "lm_eval_tasks"

Model = Annotated[str, Argument(help="folder or name of a model, or folder of an adapter")]
Limit = Annotated[int | None, Option(help="only so many first rows of each task or file")]
BatchSize = Annotated[int, Option(help="sequences at once")]
Dtype = Annotated[
    str, Option(help="auto (as saved; an adapter as it was trained), float32, bfloat16 or float16")
]
Device = Annotated[str | None, Option(help="such as cuda:1; the GPU if there is one")]


def literal_console(**options: Any) -> Console:
    """A console that takes no text for markup, and no ":smile:" for a face."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def run_eval(
    model: Model,
    out: Annotated[Path, Option(help="folder for rows.jsonl and summary.json; continued if it is there")],
    suite: Annotated[str | None, Option(help="tofu, muse, mcq, probes, or a .yaml file of your own")] = None,
    data: Annotated[
        Path | None, Option(help="folder with the suite's files; without it they come from the Hub")
    ] = None,
    retain_run: Annotated[
        Path | None,
        Option(help="the --out of a model trained without the forget rows: forget quality needs it"),
    ] = None,
    settings: Annotated[
        list[str] | None, Option("--set", help="an option of the suite, such as split=forget05")
    ] = None,
    steering: Annotated[
        str | None,
        Option(help="said before every question, {subject} for what should go: the steered teacher"),
    ] = None,
    steering_place: Annotated[
        str, Option(help="where: system (a system message), or user (before the text)")
    ] = "system",
    elicit: Annotated[
        str | None,
        Option(help="the model before unlearning: rows without an answer are compared with its own answers"),
    ] = None,
    lm_eval: Annotated[
        str | None, Option(help="tasks of lm-evaluation-harness, such as mmlu,wmdp_bio")
    ] = None,
    max_new_tokens: Annotated[
        int | None, Option(min=1, help="of an answer; default: what each task of the suite says, mostly 64")
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """What a model still says, knows and can do: a suite of questions, row by row, resumable."""
    from ..data.prompts import Prompting
    from . import models
    from .suites import runner, summary
    from .suites.suite import load_suite

    check_one_process("eval")
    console = literal_console()
    if suite is None and lm_eval is None:
        raise ValueError("suite: wanted --suite, --lm-eval or both, got neither")
    if steering is not None and lm_eval is not None:
        raise ValueError("steering: wanted --suite alone, got --lm-eval, whose prompts are its own")
    if max_new_tokens is not None and suite is None:
        raise ValueError("max_new_tokens: wanted --suite, whose answers it limits, got --lm-eval alone")
    tasks = None if lm_eval is None else lm_eval_tasks(lm_eval)
    chosen = None if suite is None else load_suite(suite, options_of(settings or ()))
    loaded, tokenizer = models.load(model, dtype, device)
    prompting = Prompting.of(model)
    answering = None
    if elicit is not None:
        asked = models.load(elicit, dtype, device)
        answering = _eliciting(asked, prompting, batch_size, console, max_new_tokens or 64)
    if chosen is not None:
        with resumable(out, console), progress(console) as shown:
            results = runner.evaluate(
                loaded,
                tokenizer,
                chosen,
                out=out,
                data=data,
                name=model,
                batch_size=batch_size,
                limit=limit,
                retain_run=retain_run,
                prompting=prompting,
                steering=steering,
                steering_place=steering_place,
                max_new_tokens=max_new_tokens,
                elicit=answering,
                progress=shown,
            )
        console.print(summary.table(results, f"{chosen.name}: {model}"))
        for task, why in results["left_out"].items():
            console.print(f"left out: {task} ({why}{'' if data is None else f' in {data}'})", soft_wrap=True)
        console.print(f"written to {out / runner.SUMMARY}", soft_wrap=True)
    if tasks is not None:
        with disk_named(out, "out"):
            run_lm_eval(loaded, tokenizer, tasks, out, limit, batch_size, console, name=model)


def run_attack(
    model: Model,
    forget: Annotated[str, Option(help="file with question and answer; value and paraphrases help")],
    out: Annotated[Path, Option(help="folder for attacks.json and rows.jsonl; continued if it is there")],
    retain: Annotated[str | None, Option(help="rows that may be known: examples and benign training")] = None,
    holdout: Annotated[str | None, Option(help="rows never trained on: membership inference")] = None,
    base: Annotated[
        str | None, Option(help="the model before unlearning, for comparison (both are in memory)")
    ] = None,
    elicit: Annotated[
        bool,
        Option(
            "--elicit", help="rows without an answer get that of --base: compared with it, not with the truth"
        ),
    ] = False,
    attacks: Annotated[
        str | None,
        Option(
            help="only some, commas between them: direct, reverse_prompt, prefill, paraphrase, continuation, few_shot, "
            "step_by_step, multi_turn, aliases, two_hop, sampling, relearning, relearning_by_form, benign_finetuning, "
            "quantisation, adapter, membership, rank_probe"
        ),
    ] = None,
    reverse_prompts: Annotated[
        Path | None,
        Option(
            help="file with the override wordings used in training, one a line; default: what the folder says"
        ),
    ] = None,
    samples: Annotated[int, Option(help="answers to each row that the attack `sampling` draws")] = 32,
    relearn_rates: Annotated[str | None, Option(help="learning rates, such as 1e-5,1e-4,1e-3")] = None,
    relearn_steps: Annotated[
        str | None, Option(help="recall is measured after these, such as 10,100,500")
    ] = None,
    threshold: Annotated[
        float, Option(help="recall of telling words that counts, for rows without a value")
    ] = 0.5,
    max_new_tokens: Annotated[int, Option(help="of an answer")] = 64,
    limit: Limit = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Try to bring back what was forgotten, by prompts and by changing the weights; the worst attack comes first."""
    from ..data.prompts import Prompting
    from ..names import check_one_of
    from . import models
    from .attacks import runner
    from .attacks.attacks import ATTACKS
    from .attacks.rows import check_unseen
    from .attacks.target import AttackOptions, Target

    check_one_process("attack")
    console = literal_console()
    if elicit and base is None:
        raise ValueError("elicit: wanted --base, the model whose answers are taken, got none")
    chosen = None if attacks is None else names_in(attacks)
    if chosen == []:
        raise ValueError(f"attacks: wanted some of {', '.join(ATTACKS)}, got none")
    for attack in chosen or ():
        check_one_of("attacks", attack, ATTACKS)
    seen = lines_of(reverse_prompts, "reverse_prompts") if reverse_prompts else _trained_wordings(model)
    given: dict[str, Any] = {"seen_reverse_prompts": seen}
    if relearn_rates is not None:
        given["relearn_rates"] = numbers_in(relearn_rates, float, "relearn_rates")
    if relearn_steps is not None:
        given["relearn_curve"] = numbers_in(relearn_steps, int, "relearn_steps")
    options = AttackOptions(
        threshold=threshold, max_new_tokens=max_new_tokens, batch_size=batch_size, samples=samples, **given
    )
    files = {"forget": forget, "retain": retain, "holdout": holdout}
    prompting, answering, before_model = Prompting.of(model), None, None
    if elicit:
        before_model = models.load(str(base), dtype, device)
        answering = _eliciting(before_model, prompting, batch_size, console, max_new_tokens)
    rows, known, unseen = (
        _attack_rows(path, name, limit, answering, console) for name, path in files.items()
    )
    check_unseen(unseen, {"forget": rows, "retain": known})
    # The base, too, is asked as the model was trained: the same questions, or nothing could be compared.
    asked = {"options": options, "prompting": prompting}
    target = Target(*models.load(model, dtype, device), rows, known, unseen, **asked)
    reasons = {attack: ATTACKS[attack].missing(target) for attack in chosen or ()}
    if reasons and all(reasons.values()):
        raise ValueError(
            f"attacks: none of these can run: {'; '.join(f'{a} ({why})' for a, why in reasons.items())}"
        )
    if base is not None and before_model is None:
        before_model = models.load(base, dtype, device)
    before = None if before_model is None else Target(*before_model, rows, **asked)
    with resumable(out, console), progress(console) as shown:
        report = runner.run_attacks(target, out=out, attacks=chosen, name=model, base=before, progress=shown)
    console.print(runner.table(report, f"{model}: the worst attack first"))
    console.print(runner.legend(report))
    console.print(f"leak: {report['success']}", soft_wrap=True)
    console.print(report["headline"], soft_wrap=True)
    console.print(f"written to {out / runner.REPORT}", soft_wrap=True)


def run_report(
    runs: Annotated[
        list[str] | None,
        Argument(
            help="folders that eval, attack, train or demo wrote, or folders of such; label=folder names the method"
        ),
    ] = None,
    out: Annotated[Path, Option(help="folder for report.html, report.md and figures")] = Path("report"),
    base: Annotated[
        list[str] | None,
        Option(help="run of the model before unlearning; a demo among the runs takes it for its base"),
    ] = None,
    teacher: Annotated[list[str] | None, Option(help="run of the base steered in context")] = None,
    forget_metric: Annotated[str | None, Option(help="task.metric, the frontier's horizontal axis")] = None,
    retain_metric: Annotated[str | None, Option(help="task.metric, its vertical axis")] = None,
    examples: Annotated[int, Option(help="questions shown per task")] = 6,
    model_before: Annotated[
        str | None, Option(help="model whose first tokens are compared, before unlearning")
    ] = None,
    model_after: Annotated[str | None, Option(help="the same model after it")] = None,
    query: Annotated[list[str] | None, Option(help="a question for both")] = None,
    top_k: Annotated[int, Option(help="likeliest first tokens of each of them")] = 8,
    steering: Annotated[
        str | None, Option(help="prefix behind which the model before is the teacher")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Everything that was measured, on one page: the table, answers side by side, frontier, relearning, first tokens."""
    from .report.report import write_report, write_topk

    topk = []
    if model_before or model_after or query:
        how = {"k": top_k, "steering": steering, "dtype": dtype, "device": device}
        topk.append(write_topk(model_before, model_after, query or (), out, **how))
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
    literal_console().print(f"written to {page} and {page.with_suffix('.md')}")


def _eliciting(
    base: tuple[Any, Any], prompting: Any, batch_size: int, console: Console, max_new_tokens: int
) -> Any:
    """(rows, name) -> the rows, with the base's answers where they had none; how many these are is printed."""
    from .elicit import ELICITED, elicit_answers

    def answering(rows: list[dict[str, Any]], argument: str) -> list[dict[str, Any]]:
        how: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        filled = elicit_answers(*base, rows, argument, prompting=prompting, **how)
        made = sum(ELICITED in row for row in filled)
        if made:
            console.print(
                f"{argument}: {made} of {len(rows)} answers are the base's own: compared with the base, not with the truth",
                soft_wrap=True,
            )
        return filled

    return answering


def _attack_rows(
    path: str | None, argument: str, limit: int | None, answering: Any, console: Console
) -> list[Any]:
    """The rows of a file that have an answer, perhaps one of `answering`; which ones are left out is printed."""
    from ..data.sources import read_table
    from .attacks.rows import read_attack_rows
    from .elicit import ELICITED
    from .values import queries_of, value_of

    if path is None:
        return []
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path!r}")
    rows = read_table(Path(path), argument, limit)
    if not rows:
        raise ValueError(f"{argument}: wanted at least one row, got none in {path!r}")
    if argument == "forget" and answering is None:
        lacking = "--elicit with --base takes the base model's own answers"
        return read_attack_rows(rows, argument, lacking)  # a row without an answer is an error
    if answering is not None:
        rows = answering(rows, argument)
    queries = queries_of(rows, argument)
    without = [query.name for query in queries if query.answer is None]
    kept, reasons = [], []
    if without:
        first = f"{without[0]} and {len(without) - 1} more" if len(without) > 1 else without[0]
        why = "--elicit takes the base's" if answering is None else "the base's was empty, cut or refused"
        reasons.append(f"{first} of {argument}: no answer ({why})")
    for row, query in zip(rows, queries, strict=True):
        if query.answer is None:
            continue
        try:
            if answering is not None and row.get(ELICITED):
                value_of(row, query.answer, query.name)
            kept.append(row)
        except ValueError as error:  # what the base does not tell cannot be forgotten
            reasons.append(f"{error}; the answer is the base's own")
    for reason in reasons:
        console.print(f"left out: {reason}", soft_wrap=True)
    if argument == "forget" and not kept:
        raise ValueError(
            f"forget: wanted rows with an answer, got none in {path}, and none of the base's answers can be taken: "
            f"{'; '.join(reasons[:3])}"
        )
    return read_attack_rows(kept, argument) if kept else []


def _trained_wordings(model: str) -> tuple[str, ...]:
    """The override wordings that a model was trained with, from the record of its run; none where there is no record."""
    from ..data.sources import read_object

    path = Path(model, "run_record.json")
    wordings = (read_object(path, "model").get("override_wordings") or []) if path.is_file() else []
    if not isinstance(wordings, list) or not all(isinstance(each, str) for each in wordings):
        raise ValueError(f"model: {path}, 'override_wordings': wanted a list of texts, got {wordings!r:.60}")
    return tuple(wordings)


def lines_of(path: Path, argument: str) -> tuple[str, ...]:
    """The wordings in a text file, one a line; empty lines are left out.

    Raises:
        FileNotFoundError, ValueError: naming the argument.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {str(path)!r}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: {path} is not UTF-8 text: {error.reason}") from None
    wordings = tuple(line.strip() for line in lines if line.strip())
    if not wordings:
        raise ValueError(f"{argument}: wanted at least one wording in {path}, got none")
    return wordings


def names_in(text: str) -> list[str]:
    """What stands between the commas of a text, without what is empty.

    Example:
        >>> names_in("prefill, relearning,")
        ['prefill', 'relearning']
    """
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers_in(text: str, kind: Callable[[str], Any], argument: str) -> tuple[Any, ...]:
    """The numbers of `1e-4,1e-3`, or the integers of `10,100`."""
    try:
        return tuple(kind(part) for part in names_in(text))
    except ValueError:
        wanted = "integers such as 10,100" if kind is int else "numbers such as 1e-4,1e-3"
        raise ValueError(f"{argument}: wanted {wanted}, got {text!r}") from None


# --- lm-evaluation-harness -------------------------------------------------------------------------------------


def lm_eval_tasks(text: str) -> list[str]:
    """`"mmlu, wmdp_bio"` -> the tasks, all of which the harness knows.

    Raises:
        ValueError: it is not installed; none or unknown tasks.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "lm_eval: wanted lm-evaluation-harness to be installed (pip install lm_eval), got no such package"
        )
    tasks, known = names_in(text), _task_manager().all_tasks
    unknown = [task for task in tasks if task not in known]
    if not tasks or unknown:
        raise ValueError(
            f"lm_eval: wanted tasks of lm-evaluation-harness, got {', '.join(unknown) or 'none'}"
        )
    return tasks


def _task_manager() -> Any:
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager(include_path=str(LM_EVAL_TASKS))


def run_lm_eval(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    out: Path,
    limit: int | None,
    batch_size: int,
    console: Console,
    *,
    name: str = "",
) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness, its own and ours (tofu_*), into `out/lm_eval.json`, beside those that are there.

    Raises:
        ValueError: `out` holds such results of another model, or with another limit.
    """
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]

    from ..data.sources import read_object
    from ..model.hashes import fingerprints
    from .journal import LM_EVAL, check_same_run, write_json

    manifest = {**fingerprints(model, tokenizer), "limit": limit}
    before = read_object(out / LM_EVAL, "out") if (out / LM_EVAL).is_file() else {}
    if before:
        check_same_run(out / LM_EVAL, before["manifest"], manifest)
    measured = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=_task_manager(),
        limit=limit,
    )
    results = {task: {k: v for k, v in row.items() if _plain(v)} for task, row in measured["results"].items()}
    out.mkdir(parents=True, exist_ok=True)
    merged = {
        "results": before.get("results", {}) | results,
        "versions": before.get("versions", {}) | measured.get("versions", {}),
    }
    write_json(out / LM_EVAL, {"model": name, "manifest": manifest, **merged})
    console.print(make_table(measured))
    console.print(f"written to {out / LM_EVAL}", soft_wrap=True)
    return results


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))


# --- console ---------------------------------------------------------------------------------------------------


def check_one_process(command: str) -> None:
    """Refuses a launcher of several processes: each of them would do the whole command and write to its folder."""
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(
            f"{command}: runs in one process, and a launcher started {processes} (WORLD_SIZE); wanted `duet {command}` alone, "
            "without accelerate launch or torchrun"
        )


def options_of(settings: Sequence[str]) -> dict[str, str]:
    """`["split=forget05"]` -> `{"split": "forget05"}`."""
    pairs = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"set: wanted option=value, got {setting!r}")
        pairs[key] = value
    return pairs


class _Lines:
    """Progress where nothing can be written over: in a file or a pipe."""

    def __init__(self, console: Console):
        self.console, self.said = console, time.monotonic()
        self.began: dict[str, float] = {}
        self.finished: set[str] = set()

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        began = self.began.setdefault(name, now)
        if name not in self.finished and (done >= total or now - self.said >= _SILENCE):
            self.said = now
            self.console.print(Text(f"{name}: {done} of {total}, {now - began:.0f} s"), soft_wrap=True)
        if done >= total:
            self.finished.add(name)


@contextmanager
def progress(console: Console) -> Iterator[Callable[..., None]]:
    """A line of progress for each task; the function to call is (name, done, total).

    Without a terminal a task's line is printed when it is done, and once a minute until then.
    """
    if not (console.is_interactive or console.is_jupyter):
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        lines: dict[str, Any] = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in lines:
                lines[name] = bars.add_task(name, total=total)
            bars.update(lines[name], completed=done, total=total)

        yield update


@contextmanager
def resumable(out: Path, console: Console) -> Iterator[None]:
    """An interrupt ends the command with a word about how to continue it; a disk that is full is said to be that of `out`."""
    try:
        with disk_named(out, "out"):
            yield
    except KeyboardInterrupt:
        console.print(
            f"interrupted; what was done is in {out}, and the same command continues it", soft_wrap=True
        )
        raise SystemExit(130) from None
