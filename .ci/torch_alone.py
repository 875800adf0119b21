"""What is in the wheel and the sdist, and that the wheel works where nothing but torch is installed.

The environment is made of links to the packages that torch itself requires (and pytest, for the tests), in a folder of
its own; `python -S` sees nothing else.
"""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
TESTS = ("test_reference", "test_cross_entropy", "test_docstrings")
OF_THE_SDIST = (
    "tests/conftest.py",
    "tests/tiny_models.py",
    "benchmarks/studies/runner.py",
    "CITATION.cff",
    "docs/index.md",
    "Makefile",
)
LOSSES = """
import sys, torch, duet_kernels
hidden = torch.randn(3, 8, requires_grad=True)
teacher = duet_kernels.linear_topk(torch.randn(3, 8), torch.randn(50, 8), k=5)
duet_kernels.topk_distill_loss(hidden, torch.randn(50, 8), teacher).backward()
duet_kernels.linear_cross_entropy(hidden, torch.randn(50, 8), torch.tensor([1, 2, 3])).backward()
assert hidden.grad.abs().sum() > 0
assert not {"transformers", "triton", "numpy"} & set(sys.modules), sorted(sys.modules)
"""
SENTENCE = r"duet needs transformers, .*: pip install 'duet-kernels\[train\]'"


def distributions(*roots: str) -> list[importlib.metadata.Distribution]:
    """The installed distributions of these names, and all that they require here."""
    todo, done = list(roots), {}
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in done:
            continue
        try:
            done[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        if name != "triton":
            todo += [
                re.match(r"[\w.-]+", each)[0] for each in done[name].requires or () if "extra ==" not in each
            ]
    return [each for name, each in done.items() if name != "triton"]


def link_all(folder: pathlib.Path, *roots: str) -> None:
    """Links to the top-level files and folders of the distributions."""
    for distribution in distributions(*roots):
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))


def python(*arguments: str, path: list[pathlib.Path], cwd: pathlib.Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def expect(done: subprocess.CompletedProcess, code: int, pattern: str = "") -> None:
    if done.returncode != code or not re.search(pattern, done.stderr):
        sys.exit(
            f"{done.args}: exit status {done.returncode}, wanted {code} and {pattern!r}\n{done.stdout}{done.stderr}"
        )


def main(dist: str) -> None:
    (wheel,), (sdist,) = (list(pathlib.Path(dist).resolve().glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    inside = zipfile.ZipFile(wheel).namelist()
    strangers = [name for name in inside if not re.match(r"(duet|duet_kernels|duet_kernels-[^/]*)/", name)]
    assert not strangers and not [name for name in inside if "stud" in name], (strangers, inside)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names.issuperset(OF_THE_SDIST), set(OF_THE_SDIST) - names
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        package, alone, tested, empty = (folder / name for name in ("wheel", "torch", "pytest", "empty"))
        for each in (alone, tested, empty):
            each.mkdir()
        zipfile.ZipFile(wheel).extractall(package)
        link_all(alone, "torch")
        link_all(tested, "pytest")
        expect(python("-c", LOSSES, path=[package, alone], cwd=empty), 0)
        expect(python("-c", "import duet", path=[package, alone], cwd=empty), 1, f"MissingExtra: {SENTENCE}")
        expect(python("-m", "duet", "env", path=[package, alone], cwd=empty), 1, rf"\Aerror: {SENTENCE}\s*\Z")
        tests = [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
        options = [
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-c",
            str(ROOT / "pyproject.toml"),
            "--rootdir",
            str(ROOT),
        ]
        expect(python("-m", "pytest", *options, *tests, path=[package, alone, tested], cwd=empty), 0)
    print(f"{wheel.name} works with torch alone; {sdist.name} holds its tests")


if __name__ == "__main__":
    main(sys.argv[1])
