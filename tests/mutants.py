"""Plant faults in the package, one at a time, and see that a test fails: `make mutants`.

    a fault   a file, a text that is there once, what it becomes, and the test that must fail then (its catcher)
    a run     the catcher, in a process of its own, on a copy of the package with that one change
    first     all catchers on the unchanged copy: one that fails there would prove nothing

A fault that survives is a test that is missing. So is one that was met in use: it gets its test, and a line in
`mutants_table.py`. What happened is in `benchmarks/results/mutants.md`: a run replaces the lines of its faults.

    python tests/mutants.py              all, ten minutes on a quiet core
    python tests/mutants.py --only TEXT  those whose file, words or catcher hold TEXT (or one of several)
    python tests/mutants.py --list       run nothing
"""

import argparse
import compileall
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from mutants_table import FAULTS

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "benchmarks/results/mutants.md"
COPIED = ("duet", "duet_kernels", "tests", "benchmarks", "configs", "docs", "pyproject.toml", "README.md")
YES, NO = "| yes |", "| **NO** |"
CAUGHT = 1, -signal.SIGSEGV  # a test failed; a wrong address ended the process
SECONDS = 120  # a catcher that takes longer hangs
# Imported before a process is split off for each fault, which then need not do it again.
OF_OTHERS = (
    "torch", "numpy", "scipy.stats", "scipy.optimize", "triton", "transformers", "transformers.trainer", "peft", "datasets",
    "rouge_score.rouge_scorer", "hypothesis.strategies", "typer", "rich.table", "safetensors.torch", "pytest",
    "transformers.models.llama.modeling_llama", "transformers.generation.utils", "torch._dynamo",
)  # fmt: skip


class Fault(NamedTuple):
    """What is wrong in words; the file; the text that is there once; what it becomes; the pytest id of the catcher."""

    what: str
    file: str
    old: str
    new: str
    catcher: str


def faults() -> list[Fault]:
    return [Fault(what, file, *rest) for file, each in FAULTS.items() for what, *rest in each]


def problem(fault: Fault) -> str | None:
    """Why the fault cannot be planted; None: it can."""
    count = (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old)
    if count == 1:
        return None
    return f"{fault.file}: {fault.what}: the text {fault.old!r} occurs {count} times, wanted once"


def pytest_of(copy: Path, catchers: list[str], log: Path) -> int:
    """pytest's exit code for these tests on the copy, from a process of its own; below 0: the signal that ended it."""
    child = os.fork()
    if child == 0:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.alarm(SECONDS * len(catchers))
        os.chdir(copy)
        sys.path[0] = str(copy)
        os.environ["PYTHONPATH"] = str(copy)
        import pytest

        code = 3
        try:
            code = int(pytest.main(["-x", "-q", "--disable-warnings", "-p", "no:cacheprovider", *catchers]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(chosen: list[Fault]) -> int:
    """Plant the faults; 0 if each of them was caught."""
    # Read when the kernels are imported, and by what is imported below.
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.dont_write_bytecode = True  # a file that is changed twice in a second would be read from its bytecode
    for name in OF_OTHERS:
        importlib.import_module(name)
    lines, survivors = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        copy, log = Path(folder, "copy"), Path(folder, "log")
        for name in COPIED:
            source, there = ROOT / name, copy / name
            if source.is_dir():
                shutil.copytree(source, there, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, there)
        compileall.compile_dir(copy / "duet", quiet=1)
        compileall.compile_dir(copy / "duet_kernels", quiet=1)
        if pytest_of(copy, list(dict.fromkeys(fault.catcher for fault in chosen)), log):
            sys.exit(f"a catcher fails without any fault:\n{log.read_text()}")
        for fault in chosen:
            start, code = time.monotonic(), planted(fault, copy, log)
            caught = code in CAUGHT
            survivors += not caught
            lines[fault] = f"{beginning(fault)} {time.monotonic() - start:.0f} {YES if caught else NO}"
            print(lines[fault], flush=True)
            if not caught:
                print(f"pytest ended with {code}:\n{log.read_text()[-2000:]}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults were caught")
    write_table(lines)
    return int(survivors > 0)


def planted(fault: Fault, copy: Path, log: Path) -> int:
    """What pytest says of the catcher while the fault is there."""
    path = copy / fault.file
    path.write_text(path.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
    try:
        return pytest_of(copy, [fault.catcher], log)
    finally:
        shutil.copy2(ROOT / fault.file, path)


def beginning(fault: Fault) -> str:
    """Of the fault's line in the table."""
    return f"| {fault.what} | `{fault.file}` | `{fault.catcher}` |"


def write_table(lines: dict[Fault, str]) -> None:
    """Put the lines into the table, in the order of the faults; lines of faults that are gone leave it."""
    before = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    kept = {fault: line for fault in faults() for line in before if line.startswith(beginning(fault))}
    told = [line for fault in faults() if (line := (kept | lines).get(fault))]
    head = f"# Planted faults\n\nWritten by `make mutants`: {sum(YES in line for line in told)} of {len(told)} were caught."
    names = "| fault | file | caught by | s | caught |\n|---|---|---|---|---|"
    TABLE.write_text("\n".join((head, "", names, *told, "")), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[""], help="faults whose file, words or catcher hold one of these"
    )
    parser.add_argument("--list", action="store_true", help="run nothing")
    args = parser.parse_args()
    chosen = [fault for fault in faults() if any(only in text for only in args.only for text in fault)]
    wrong = list(filter(None, map(problem, chosen)))
    if wrong or not chosen:
        sys.exit("\n".join(wrong) or f"--only: no fault holds any of {args.only}")
    if args.list:
        print("\n".join(f"{fault.file}: {fault.what}  <-  {fault.catcher}" for fault in chosen))
        return 0
    return run(chosen)


if __name__ == "__main__":
    sys.exit(main())
