"""One table of divergences: what it says is checked everywhere, and a name that is forgotten somewhere is an error."""

import ast
import math
import os
import re
import textwrap
from pathlib import Path
from typing import get_args

os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is decorated

import pytest
import torch
import torch.nn.functional as F

from duet_kernels import LMHead, TopK, options, reference, topk_distill_loss
from duet_kernels.head import Need
from duet_kernels.options import DIVERGENCES, Divergence, DivergenceName, require_every
from duet_kernels.portable import terms
from duet_kernels.testing import make_problem

ROOM = Path(options.__file__).parent
FILES = {"options.py", "reference.py", "portable/terms.py", "triton/terms.py"}
SPEC = {"temperature": 1.0, "beta": 0.3, "delta": 1.0}


def import_without(module, lines):
    """Run the module's source without these lines, each of which stands there once."""
    source = Path(module.__file__).read_text()
    for line in lines:
        assert source.count(line) == 1, line
        source = source.replace(line, "")
    names = {"__name__": module.__name__, "__package__": module.__package__}
    exec(compile(source, module.__file__, "exec"), names)


@pytest.mark.parametrize(
    "module, line, table",
    [
        (options, '    "mse": Traits(equation="sum d^2", normalizations=(), reads=(), noise=False),\n', "DIVERGENCES"),
        (reference, '    "mse": _mse,\n', "_OF_LOGITS"),
        (reference, '    "symmetric_kl": _symmetric_kl,\n', "_OF_DISTRIBUTIONS"),
        (terms, '    "mse": _mse,\n', "OF_LOGITS"),
        (terms, '    "symmetric_kl": _symmetric_kl,\n', "OF_DISTRIBUTIONS"),
    ],
)  # fmt: skip
def test_a_forgotten_name_is_an_error_on_import(module, line, table):
    name = line.split('"')[1]
    with pytest.raises(TypeError, match=rf"{table}: .*forgotten: {name}; unknown: none$"):
        import_without(module, [line])
    import_without(module, [])


def test_a_forgotten_bound_of_the_kernels_is_an_error_on_import():
    pytest.importorskip("triton")
    from duet_kernels.triton import terms as kernels

    with pytest.raises(TypeError, match=r"triton.terms.BOUNDS: .*forgotten: tvd; unknown: none$"):
        import_without(kernels, ['    "tvd": _CONSTANT,\n'])


def test_a_name_that_no_divergence_has_is_an_error_on_import():
    with pytest.raises(
        TypeError, match=r"^here: wanted an entry for each of a, b; forgotten: b; unknown: c$"
    ):
        require_every("here", {"a": 1, "c": 2}, ("a", "b"))


@pytest.fixture
def unheard_of(monkeypatch):
    """Two divergences that the table knows and no kernel does."""
    pytest.importorskip("triton")
    from duet_kernels.triton import terms as kernels

    for name, like in (("of logits", "mse"), ("of distributions", "jsd")):
        monkeypatch.setitem(DIVERGENCES, name, DIVERGENCES[like])
        monkeypatch.setitem(kernels.BOUNDS, name, kernels.BOUNDS[like])


@pytest.mark.parametrize("normalization", ["none", "renormalize", "tail"])
def test_a_kernel_without_a_branch_is_refused(normalization, unheard_of):
    """Never a silent last branch, in the kernel of the slots, the fused one, with a tail, or over the vocabulary."""
    from duet_kernels import triton
    from duet_kernels.triton import gather_loss, topk_divergence

    problem = make_problem(4, 40, 8)
    top = problem.teacher_topk(3)
    spec = Divergence("of logits" if normalization == "none" else "of distributions", normalization, **SPEC)
    inputs, row = (problem.hidden, problem.head), torch.ones(4)
    refused = pytest.raises(Exception, match=r"terms.py: of_.* has no branch for this divergence")
    with refused:
        topk_divergence.topk_divergence(top.values, top.values, row, row, row, spec)
    with refused:
        if normalization == "tail":
            triton.topk_loss_with_tail(*inputs, top.indices, top.values, row, row, spec, Need(True))
        else:
            gather_loss.topk_loss(*inputs, top.indices, top.values, row, spec, Need(True))
    if normalization != "tail":
        teacher = problem.teacher_hidden, problem.teacher_head
        for need in (Need(True), Need(False)):
            with refused:
                triton.linear_divergence(*inputs, *teacher, row, spec, need)


def test_a_divergence_stands_in_four_files():
    """A name in a fifth one would be a list that the next divergence has to find."""
    found = {
        str(path.relative_to(ROOM))
        for path in ROOM.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value == "symmetric_kl"
    }
    assert found == FILES


def test_the_recipe_can_be_followed():
    """CONTRIBUTING.md's example is new, and its definitions, derivatives and bound agree."""
    pytest.importorskip("triton")
    from duet_kernels.triton import terms as kernels

    text = (ROOM.parent / "CONTRIBUTING.md").read_text().split("## Add a divergence\n")[1].split("\n## ")[0]
    code = [textwrap.dedent(block) for block in re.findall(r"(?:^ {8}.*\n)+", text, re.MULTILINE)]
    traits, of_reference, of_terms, branch, bound, of_tests = code
    name, its_traits = dict(eval(f"{{{traits}}}", vars(options))).popitem()
    assert name not in DIVERGENCES and its_traits.normalizations
    spec = Divergence("jsd", "renormalize", **SPEC)
    x, log_p = (torch.randn(5, 7, dtype=torch.float64, generator=torch.manual_seed(i)) for i in range(2))
    x, log_p = x.requires_grad_(), log_p.log_softmax(1)
    log_q = x.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()

    def defined(source, module):
        names = dict(vars(module))
        exec(source, names)
        return names[f"_{name}"]

    noise = torch.zeros(5, 1)
    wanted = defined(of_reference, reference)(reference._Pair(p, q, log_p, log_q, noise), spec).sum(1)
    gradient = torch.autograd.grad(wanted.sum(), x)[0]
    of_torch = dict(eval(f"{{{of_tests}}}", {"torch": torch, "F": F, **locals()}))[name]()
    p, q, w = (each.detach() for each in (p, q, log_q - log_p))
    in_torch = {"tl": torch, "minus": terms.difference, "expected": terms.expected}
    written = in_torch | {"p": p, "q": q, "w": w, "DIVERGENCE": name}
    exec(branch.removeprefix("el"), written)
    found = defined(of_terms, terms)(p, q, w, noise, spec), (written["terms"].sum(1), written["a"])
    for loss, a in ((of_torch, None), *found):
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
        if a is not None:
            torch.testing.assert_close(a - q * a.sum(1, keepdim=True), gradient, rtol=1e-12, atol=1e-14)
    most = dict(eval(f"{{{bound}}}", vars(kernels)))[name].at(spec, wanted)
    assert (gradient.abs() <= torch.as_tensor(most)).all()


def test_names_and_equations_reach_the_reader():
    assert set(get_args(DivergenceName)) == set(DIVERGENCES)
    text = topk_distill_loss.__doc__ or ""
    for name, traits in DIVERGENCES.items():
        assert f"* `{name}` = {traits.equation}\n" in text


@pytest.mark.parametrize("name", DIVERGENCES)
def test_options_are_checked_by_the_table(name):
    traits = DIVERGENCES[name]
    for normalization in options.NORMALIZATIONS:
        if normalization in traits.normalizations:
            assert Divergence.of(name, normalization, **SPEC).normalization == normalization
        else:
            with pytest.raises(ValueError, match=r"^normalization: "):
                Divergence.of(name, normalization, **SPEC)
    for option, wrong in (("beta", 1.0), ("delta", -1.0)):
        if option in traits.reads:
            with pytest.raises(ValueError, match=rf"^{option}: .*got {wrong}"):
                Divergence.of(name, None, **{**SPEC, option: wrong})
        else:
            Divergence.of(name, None, **{**SPEC, option: wrong})
    with pytest.raises(ValueError, match=r"^temperature: "):
        Divergence.of(name, None, **{**SPEC, "temperature": 2.0 if not traits.normalizations else 0.0})


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_a_symmetric_kl_by_hand(impl, beta):
    """p = (1/2, 1/2), q = (1/4, 3/4). beta is the weight of KL(teacher || student); at 1/2 the sides may be swapped."""
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)

    def loss(student, teacher):
        hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.tensor(student).double().log()[:, None]
        top = TopK(torch.tensor([teacher]).double().log(), torch.tensor([[0, 1]]), torch.tensor([-math.inf]))
        options = {"divergence": "symmetric_kl", "beta": beta, "impl": impl}
        return topk_distill_loss(hidden, LMHead(weight), top, **options).item()

    assert loss([0.25, 0.75], [0.5, 0.5]) == pytest.approx(beta * forward + (1 - beta) * reverse, rel=1e-12)
    assert loss([0.5, 0.5], [0.25, 0.75]) == pytest.approx(beta * reverse + (1 - beta) * forward, rel=1e-12)
