"""What `duet eval` and `duet attack` do once their arguments are parsed: load, run with a progress display, show a table.

Knows the console: one that takes texts as they are, so that a path or a question with [brackets] is printed whole. Must
not know how anything is measured.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LM_EVAL_TASKS = Path(__file__).parent / "suites" / "lm_eval_tasks"


def run_eval(
    name: str,
    *,
    suite: str | None,
    out: Path,
    data: Path | None = None,
    retain_run: Path | None = None,
    settings: Sequence[str] = (),
    steering: str | None = None,
    lm_eval: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """`duet eval`: a suite, or tasks of lm-evaluation-harness, or both; see `runner.evaluate`."""
    from ..data.prompts import Prompting
    from . import models
    from .suites import runner, summary
    from .suites.suite import load_suite

    console = console or literal_console()
    if suite is None and lm_eval is None:
        raise ValueError("suite: wanted --suite, --lm-eval or both, got neither")
    if steering is not None and lm_eval is not None:
        raise ValueError("steering: wanted --suite alone, got --lm-eval, whose prompts are its own")
    tasks = None if lm_eval is None else lm_eval_tasks(lm_eval)
    chosen = None if suite is None else load_suite(suite, options_of(settings))
    model, tokenizer = models.load(name, dtype, device)
    results: dict[str, Any] = {}
    if chosen is not None:
        with _resumable(out, console), progress(console) as shown:
            results = runner.evaluate(
                model,
                tokenizer,
                chosen,
                out=out,
                data=data,
                name=name,
                batch_size=batch_size,
                limit=limit,
                retain_run=retain_run,
                prompting=Prompting.of(name),
                steering=steering,
                progress=shown,
            )
        console.print(summary.table(results, f"{chosen.name}: {name}"))
        for task in results["left_out"]:
            console.print(f"left out: {task} (no such file in {data})", soft_wrap=True)
        console.print(f"written to {out / runner.SUMMARY}", soft_wrap=True)
    if tasks is not None:
        results["lm_eval"] = run_lm_eval(model, tokenizer, tasks, out, limit, batch_size, console, name=name)
    return results


def run_attack(
    name: str,
    *,
    forget: str,
    out: Path,
    retain: str | None = None,
    holdout: str | None = None,
    base: str | None = None,
    attacks: str | None = None,
    reverse_prompts: Path | None = None,
    relearn_rates: str | None = None,
    relearn_steps: str | None = None,
    threshold: float = 0.5,
    max_new_tokens: int = 64,
    limit: int | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """`duet attack`; see `attack_run.run_attacks`."""
    from ..data.prompts import Prompting
    from ..data.sources import read_table
    from ..names import check_one_of
    from . import models
    from .attacks import runner as attack_run
    from .attacks.attacks import ATTACKS
    from .attacks.rows import read_attack_rows
    from .attacks.target import AttackOptions, Target

    console = console or literal_console()

    def rows_of(path: str | None, argument: str) -> list[Any]:
        if path is None:
            return []
        if not Path(path).is_file():
            raise FileNotFoundError(f"{argument}: there is no file {path!r}")
        return read_attack_rows(read_table(Path(path), argument)[:limit], argument)

    if limit is not None and limit < 1:
        raise ValueError(f"limit: wanted an integer >= 1, got {limit}")
    chosen = None if attacks is None else [attack.strip() for attack in attacks.split(",") if attack.strip()]
    if chosen == []:
        raise ValueError(f"attacks: wanted some of {', '.join(ATTACKS)}, got none")
    for attack in chosen or ():
        check_one_of("attacks", attack, ATTACKS)
    given: dict[str, Any] = {}
    if reverse_prompts is not None:
        given["seen_reverse_prompts"] = _wordings(reverse_prompts)
    if relearn_rates is not None:
        given["relearn_rates"] = _numbers(relearn_rates, float, "relearn_rates")
    if relearn_steps is not None:
        given["relearn_curve"] = _numbers(relearn_steps, int, "relearn_steps")
    options = AttackOptions(
        threshold=threshold, max_new_tokens=max_new_tokens, batch_size=batch_size, **given
    )
    rows, kept, unseen = (
        rows_of(path, key) for key, path in (("forget", forget), ("retain", retain), ("holdout", holdout))
    )
    # The base, too, is asked as the model was trained: the same questions, or nothing could be compared.
    asked = {"options": options, "prompting": Prompting.of(name)}
    target = Target(*models.load(name, dtype, device), rows, kept, unseen, **asked)
    before = None if base is None else Target(*models.load(base, dtype, device), rows, **asked)
    with _resumable(out, console), progress(console) as shown:
        report = attack_run.run_attacks(
            target, out=out, attacks=chosen, name=name, base=before, progress=shown
        )
    console.print(attack_run.table(report, f"{name}: the worst attack first"))
    console.print(attack_run.legend(report))
    console.print(f"leak: {report['success']}", soft_wrap=True)
    console.print(f"written to {out / attack_run.REPORT}", soft_wrap=True)
    return report


def _wordings(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"reverse_prompts: there is no file {str(path)!r}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"reverse_prompts: {path} is not UTF-8 text: {error.reason}") from None
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise ValueError(f"reverse_prompts: wanted at least one wording in {path}, got none")
    return found


def _numbers(text: str, kind: Callable[[str], Any], argument: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{argument}: wanted numbers such as 1e-4,1e-3, got {text!r}") from None


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
    tasks = [task.strip() for task in text.split(",") if task.strip()]
    unknown = [task for task in tasks if task not in _task_manager().all_tasks]
    if not tasks or unknown:
        raise ValueError(
            f"lm_eval: wanted tasks of lm-evaluation-harness, got {', '.join(unknown) or 'none'}"
        )
    return tasks


def _task_manager() -> Any:
    from lm_eval.tasks import TaskManager

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
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    from ..model.hashes import fingerprints
    from .journal import LM_EVAL, write_json

    manifest = {
        **fingerprints(model, tokenizer),
        "limit": limit,
    }
    before = json.loads((out / LM_EVAL).read_text(encoding="utf-8")) if (out / LM_EVAL).is_file() else {}
    for key, value in manifest.items():
        if before and before["manifest"].get(key) != value:
            raise ValueError(
                f"out: {out / LM_EVAL} holds results of another run: {key} was {before['manifest'].get(key)!r} and is "
                f"{value!r} now; wanted a new folder"
            )
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=_task_manager(),
        limit=limit,
    )
    results = {task: {k: v for k, v in row.items() if _plain(v)} for task, row in found["results"].items()}
    out.mkdir(parents=True, exist_ok=True)
    kept = {
        key: before.get(key, {}) | new
        for key, new in (("results", results), ("versions", found.get("versions", {})))
    }
    write_json(out / LM_EVAL, {"model": name, "manifest": manifest, **kept})
    console.print(make_table(found))
    console.print(f"written to {out / LM_EVAL}", soft_wrap=True)
    return results


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))


# --- console ---------------------------------------------------------------------------------------------------


def literal_console(**options: Any) -> Console:
    """A console that takes no text for markup, and no ":smile:" for a face."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def options_of(settings: Sequence[str]) -> dict[str, str]:
    """`["split=forget05"]` -> `{"split": "forget05"}`."""
    pairs = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"set: wanted option=value, got {setting!r}")
        pairs[key] = value
    return pairs


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A line of progress for each task; the function to call is (name, done, total)."""
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
def _resumable(out: Path, console: Console) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.print(
            f"interrupted; what was done is in {out}, and the same command continues it", soft_wrap=True
        )
        raise SystemExit(130) from None
