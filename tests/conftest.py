"""What every test relies on: interpreted kernels, one thread a process, and memory that is never zero by luck."""

import os

# Read where a kernel is decorated, so before anything imports triton. TRITON_INTERPRET=0 runs the kernels on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# The workers of pytest-xdist share the cores: a thread pool in each of them only fights the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config):
    # The interpreter is numpy: a NaN or an infinity that a test puts in is no news.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory is NaN (integers: the largest one): an element that nobody writes cannot pass for a zero."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
