"""What every test relies on: interpreted kernels, one thread a process, and memory that is never zero by luck."""

import gc
import importlib.util
import inspect
import os
import sys

# Read where a kernel is decorated, so before anything imports triton. TRITON_INTERPRET=0 runs the kernels on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# The workers of pytest-xdist share the cores: a thread pool in each of them only fights the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# Until all tests are collected nothing is garbage: the imports make a million objects that stay.
gc.disable()


def patch_the_language_once_a_launch():
    """The same results of interpreted kernels in about half of the time.

    Triton's interpreter replaces the functions of its language when a kernel starts, and looks through all of them again
    at every call of one jitted function by another, only to find that it has replaced them.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, launch, patched, sees = interpreter._patch_lang, interpreter.GridExecutor.__call__, set(), {}

    def patch_what_is_new(fn):
        if fn not in sees:
            sees[fn] = {
                value for value in fn.__globals__.values() if value is language or value is language.core
            }
        seen = sees[fn]
        if seen and seen <= patched:
            return None  # a call inside of a kernel: nobody asks for what to give back
        patched.update(seen)
        return patch(fn)

    def start(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_what_is_new, start

    semantic, replacements = interpreter.interpreter_semantic, {}
    asks_for_semantic = language.core.builtin(lambda: None).__code__

    def interpreted(member):
        if getattr(member, "__code__", None) is asks_for_semantic:  # and finds it
            member = member.__wrapped__

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
    handle, bytes_of = interpreter.TensorHandle, {}

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

    def fits(data, kind):
        if kind.name not in bytes_of:
            bytes_of[kind.name] = 8 if kind.is_ptr() else max(kind.primitive_bitwidth // 8, 1)
        return data.itemsize <= bytes_of[kind.name]

    def hold(self, data, dtype, attr=None):
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if not fits(data, dtype):
            self.__post_init__()  # which says so

    handle.__init__, interpreter._validate_np_data_size = hold, fits
    core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype = block, tensor, in_numpy
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def match_operands_once():
    """The interpreter's two operands of an operator, as numbers of one type and shape, without doing again what was done.

    Two tensors of one element type, or an address and its offset, only need one shape. A Python number beside a tensor
    becomes a tensor of its type: the same one each time, which nobody can write into.
    """
    from triton import language
    from triton.runtime import interpreter

    semantic, tensor, known, shapes = interpreter.interpreter_semantic, language.core.tensor, {}, {}
    types = {}
    match, halves = type(semantic).binary_op_type_checking_impl, ("fp16", "bf16")
    broadcast = type(semantic).broadcast_impl_value

    def no_cast(left, right, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod):
        if left.is_ptr() or right.is_ptr():
            return (allow_lhs_ptr and right.is_int()) or (allow_rhs_ptr and left.is_int())
        return left.name == right.name and not left.is_fp8() and not (div_or_mod and left.name in halves)

    def operands(lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        options = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        left_is, right_is = type(lhs) is tensor, type(rhs) is tensor
        if left_is and right_is:
            a, b = lhs.type.scalar, rhs.type.scalar
            if not no_cast(a, b, *options):
                key = a.name, b.name, options
                if key not in types:
                    types[key] = [x.type.scalar for x in match(semantic, lhs, rhs, *options)]
                left, right = types[key]
                lhs, rhs = semantic.cast(lhs, left), semantic.cast(rhs, right)
            return broadcast_what_differs(lhs, rhs, alone)
        if not left_is and not right_is:
            return match(semantic, lhs, rhs, *options)
        given, number = (lhs, rhs) if left_is else (rhs, lhs)
        key = left_is, type(number), str(number), given.type.name, options
        if key not in known:
            both = match(semantic, lhs, rhs, *options)
            if both[right_is] is not given:
                return both
            if len(known) == 1000:
                known.clear()
            both[left_is].handle.data.flags.writeable = False
            known[key] = both[left_is]
        return (lhs, known[key]) if left_is else (known[key], rhs)

    def spread(given, kind, shape):
        if given.type.is_block():
            data = interpreter.np.broadcast_to(given.handle.data, shape)
        else:
            data = interpreter.np.full(shape, given.handle.data, given.handle.data.dtype)
        return tensor(interpreter.TensorHandle(data, given.handle.dtype.scalar), kind)

    def alone(given, kind, shape):
        return tensor(given.handle, kind)  # numpy spreads it, beside the other one

    def broadcast_what_differs(lhs, rhs, spread=spread):
        a, b = lhs.type, rhs.type
        if a.name == b.name:
            return lhs, rhs
        key = a.name, b.name
        if key not in shapes:
            left, right = broadcast(semantic, lhs, rhs)
            shape = tuple(left.type.get_block_shapes()) if left.type.is_block() else None
            shapes[key] = (left is not lhs and left.type, right is not rhs and right.type, shape)
        left, right, shape = shapes[key]
        return spread(lhs, left, shape) if left else lhs, spread(rhs, right, shape) if right else rhs

    cast, casts = type(semantic).cast, {}

    def cast_of(source, wanted):
        """Whether the interpreter, after a dozen questions, does nothing but convert the numbers."""
        halves_meet = any(
            a.name in halves and not b.is_fp32() for a, b in ((source, wanted), (wanted, source))
        )
        return not (
            halves_meet or wanted.is_bool() or any(x.is_ptr() or x.is_fp8() for x in (source, wanted))
        )

    def converted(given, kind, rounding=None):
        source, wanted = given.type.scalar, kind.scalar
        key = source.name, wanted.name
        if key not in casts:
            casts[key] = source.name != wanted.name and cast_of(source, wanted)
        if rounding is not None or not casts[key]:
            return cast(semantic, given, kind, rounding)
        kind = given.type.with_element_ty(wanted) if given.type.is_block() else wanted
        return tensor(semantic.builder.cast_impl(given.handle, wanted), kind)

    semantic.cast = converted
    semantic.binary_op_type_checking_impl = operands
    semantic.broadcast_impl_value = broadcast_what_differs


def look_for_overflow_in_numpy():
    """The interpreter's check that sums and products of integers fit their type, in three steps of numpy, not ten of its own."""
    from triton.runtime import interpreter

    semantic, np, checks = interpreter.interpreter_semantic, interpreter.np, {}
    check = type(semantic).binary_op_sanitize_overflow_impl
    in_numpy = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def overflow(lhs, rhs, binary_op):
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        if kind.name not in checks:
            checks[kind.name] = kind.get_int_min_value(), kind.get_int_max_value()
        least, most = checks[kind.name]
        operator = in_numpy[binary_op.__name__]
        exact = operator(lhs.handle.data, rhs.handle.data, dtype=np.int64)
        if exact.min() < least or exact.max() > most:
            check(semantic, lhs, rhs, binary_op)  # which says so

    semantic.binary_op_sanitize_overflow_impl = overflow


def pytest_configure(config):
    if importlib.util.find_spec("triton"):
        patch_the_language_once_a_launch()
        remember_what_types_say()
        match_operands_once()
        look_for_overflow_in_numpy()
    # The interpreter is numpy: a NaN or an infinity that a test puts in is no news.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_finish(session):
    """What the imports made lives to the end: not walked through by every gc.collect(), of which each training has one.

    And before each training the steered teacher says two tokens to a query, not sixteen: a random model ends no answer.
    """
    if asking := sys.modules.get("duet.methods.asking"):
        asking.TOKENS = 2
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory is NaN (integers: the largest one): an element that nobody writes cannot pass for a zero."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch._C._set_deterministic_algorithms(True, warn_only=False)  # torch's own function imports the compiler
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch._C._set_deterministic_algorithms(before[0], warn_only=False)
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


@pytest.fixture(autouse=True)
def workspace_of_the_test():
    """A trainer sets the workspace of the whole process; the next test has the default again."""
    yield
    if (dispatch := sys.modules.get("duet_kernels.dispatch")) is not None:
        dispatch.set_workspace_bytes(None)
