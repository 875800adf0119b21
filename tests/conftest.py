"""What every test relies on: interpreted kernels, one thread a process, and memory that is never zero by luck."""

import gc
import importlib.util
import inspect
import os

# Read where a kernel is decorated, so before anything imports triton. TRITON_INTERPRET=0 runs the kernels on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# The workers of pytest-xdist share the cores: a thread pool in each of them only fights the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def patch_the_language_once_a_launch():
    """The same results of interpreted kernels in about half of the time.

    Triton's interpreter replaces the functions of its language when a kernel starts, and looks through all of them again
    at every call of one jitted function by another, only to find that it has replaced them.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_what_is_new(fn):
        seen = {value for value in fn.__globals__.values() if value is language or value is language.core}
        if seen and seen <= patched:
            return None  # a call inside of a kernel: nobody asks for what to give back
        patched.update(seen)
        return patch(fn)

    def start(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_what_is_new, start

    semantic, replacements = interpreter.interpreter_semantic, {}

    def interpreted(member):
        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        return call

    def patch_builtins(package, builder, scope):
        if package not in replacements:
            members = inspect.getmembers(package, language.core.is_builtin)
            replacements[package] = [(name, interpreted(member)) for name, member in members]
        for name, replacement in replacements[package]:
            scope.set_attr(package, name, replacement)

    interpreter._patch_builtin = patch_builtins


def remember_what_types_say():
    """The interpreter makes a type, its shape and its checks anew for every value: here once for each type."""
    from triton.language import core
    from triton.runtime import interpreter

    make_block, make_tensor, equal = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__
    numpy_type, blocks, tensors, numpy_types = interpreter._get_np_dtype, {}, {}, {}

    def block(self, element_ty, shape):
        key = element_ty.name, tuple([s.value if type(s) is core.constexpr else s for s in shape])
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def tensor(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = {name: value for name, value in vars(self).items() if name != "handle"}
        vars(self).update(tensors[type.name], handle=handle)

    def in_numpy(kind):
        if kind.name not in numpy_types:
            numpy_types[kind.name] = numpy_type(kind)
        return numpy_types[kind.name]

    core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype = block, tensor, in_numpy
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def match_operands_once():
    """The interpreter's two operands of an operator, as numbers of one type and shape, without doing again what was done.

    Two tensors of one type are left as they are. A Python number beside a tensor becomes a tensor of its type: the same
    one each time, which nobody can write into.
    """
    from triton import language
    from triton.runtime import interpreter

    semantic, tensor, known = interpreter.interpreter_semantic, language.core.tensor, {}
    match, halves = type(semantic).binary_op_type_checking_impl, ("fp16", "bf16")
    broadcast = type(semantic).broadcast_impl_value

    def operands(lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        options = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        if type(lhs) is not tensor:
            return match(semantic, lhs, rhs, *options)
        if type(rhs) is tensor:
            scalar = lhs.type.scalar
            same = lhs.type.name == rhs.type.name and not scalar.is_ptr() and not scalar.is_fp8()
            if same and not (div_or_mod and scalar.name in halves):
                return lhs, rhs
            return match(semantic, lhs, rhs, *options)
        key = type(rhs), str(rhs), lhs.type.name, options
        if key in known:
            return lhs, known[key]
        left, right = match(semantic, lhs, rhs, *options)
        if left is lhs:
            if len(known) == 1000:
                known.clear()
            right.handle.data.flags.writeable = False
            known[key] = right
        return left, right

    def broadcast_what_differs(lhs, rhs):
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and list(a.shape) == list(b.shape):
            return lhs, rhs
        return broadcast(semantic, lhs, rhs)

    semantic.binary_op_type_checking_impl = operands
    semantic.broadcast_impl_value = broadcast_what_differs


def pytest_configure(config):
    if importlib.util.find_spec("triton"):
        patch_the_language_once_a_launch()
        remember_what_types_say()
        match_operands_once()
    # The interpreter is numpy: a NaN or an infinity that a test puts in is no news.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_finish(session):
    """What the imports made lives to the end: not walked through by every gc.collect(), of which each training has one."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """`chunked` takes on CPU tensors the ways of a GPU, and torch.mm and its like multiply halves into fp32.

    The products stand in for the library's: their sums are those of the operands upcast.
    """
    from duet_kernels import dispatch
    from duet_kernels.portable import cuts

    def product(a, b, dtype):
        return a.to(dtype) @ b.to(dtype)

    def product_out(a, b, dtype, *, out):
        return out.copy_(product(a, b, dtype))

    def sum_out(c, a, b, dtype, *, beta=1, alpha=1, out):
        assert beta == alpha == 1
        return out.copy_(c + product(a, b, dtype))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm.dtype", product, "CPU")
        library.impl("bmm.dtype", product, "CPU")
        library.impl("mm.dtype_out", product_out, "CPU")
        library.impl("addmm.dtype_out", sum_out, "CPU")
        monkeypatch.setattr(dispatch, "half_products", lambda device, dtype: dtype in dispatch.HALVES)
        monkeypatch.setattr(cuts, "asynchronous", lambda device: True)
        yield


@pytest.fixture
def answers_end(monkeypatch):
    """Answers count as ended: a random model never ends one, and an answer that was cut is not judged."""
    from duet.evaluation.generation import Continuation

    monkeypatch.setattr(Continuation, "cut", False)
