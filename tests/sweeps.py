"""Sweeps of which `make test` runs enough to see each value of each parameter, and `make test-long` the rest."""

import pytest


def case(*values, slow, id=None):
    """One case of a sweep; a slow one is left to `make test-long`."""
    return pytest.param(*values, id=id, marks=[pytest.mark.slow] * slow)
