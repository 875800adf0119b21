"""Every example in a docstring of duet_kernels runs and gives what it says."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import duet_kernels

ROOMS = [
    room.name
    for room in pkgutil.walk_packages(duet_kernels.__path__, "duet_kernels.")
    if ".triton" not in room.name  # imports triton
]


def _examples(room):
    module = importlib.import_module(room)
    found = doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__)
    for test in found:
        if test.examples:
            test.globs.setdefault("torch", torch)
            yield test


EXAMPLES = [test for room in ROOMS for test in _examples(room)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_example(example):
    if "transformers" in example.docstring:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    out = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=out.append)
    assert runner.failures == 0, "".join(out)


def test_public_functions_have_examples():
    with_examples = {test.name.split(".")[-1] for test in EXAMPLES}
    functions = {name for name in duet_kernels.__all__ if name[0].islower()}
    assert functions <= with_examples, functions - with_examples
