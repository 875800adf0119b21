"""Test an integration as this package tests itself: inputs, an error budget, and a gradient contract.

* `make_problem` draws inputs with real probability mass: a teacher that correlates with the student, logits of
  standard deviation 2 to 4. On tiny or zero logits every softmax is flat and every wrong gradient is small.
* `assert_within_budget` asks that a result errs no more than torch itself would in that dtype, judged in fp64. An
  absolute tolerance large enough for bf16 accepts a gradient of zeros; this does not.
* `OPS` is one table of every differentiable operation with its options, `CHECKS` what each of them has to obey, and
  `gradient_contract(op, problem)` runs them. An `Op` of your own (a loss built on these, say) obeys the same.

Definition: `impl="reference"`. Uses public functions only.
"""

from .budget import (
    Error,
    IllConditioned,
    assert_within_budget,
    worst,
)
from .contract import (
    CHECKS,
    check_backward_twice,
    check_definition,
    check_layouts,
    check_masked_rows,
    check_nan_row,
    check_reductions,
    check_second_derivative,
    check_subsets,
    check_upstream,
    gradient_contract,
    gradients,
    judge,
)
from .operations import (
    DISTRIBUTIONS,
    IGNORE,
    OPS,
    Op,
)
from .problems import (
    LEAVES,
    Problem,
    make_problem,
)

__all__ = [
    "CHECKS",
    "DISTRIBUTIONS",
    "IGNORE",
    "LEAVES",
    "OPS",
    "Error",
    "IllConditioned",
    "Op",
    "Problem",
    "assert_within_budget",
    "check_backward_twice",
    "check_definition",
    "check_layouts",
    "check_masked_rows",
    "check_nan_row",
    "check_reductions",
    "check_second_derivative",
    "check_subsets",
    "check_upstream",
    "gradient_contract",
    "gradients",
    "judge",
    "make_problem",
    "worst",
]
