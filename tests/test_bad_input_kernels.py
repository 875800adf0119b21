"""One table of what must not be asked of duet_kernels, and of odd requests that have a documented answer.

Every refusal names the argument, what came and what was wanted.
"""

import os
from fractions import Fraction

os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is decorated

import numpy as np
import pytest
import torch

from duet_kernels import (
    LinearCrossEntropyLoss,
    LinearDistillLoss,
    LMHead,
    TopK,
    TopKDistillLoss,
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    resolve_impl,
    set_workspace_bytes,
    topk_distill_loss,
    topk_distill_stats,
)

N, V, D, K = 5, 23, 8, 4


def _generator():
    return torch.Generator().manual_seed(0)


H = torch.randn(N, D, generator=_generator())
W = torch.randn(V, D, generator=_generator())
T = torch.randn(N, D, generator=_generator()) + 0.1
TOP = linear_topk(T, W, K)
WARM = linear_topk(T, W, K, temperature=2.0)
LABELS = torch.arange(N)
IDS = TOP.indices
NESTED = torch.nested.nested_tensor([H, H[:2]])
GRAD = torch.randn(N, D, requires_grad=True)


def topk(hidden=H, head=W, teacher=TOP, **options):
    return topk_distill_loss(hidden, head, teacher, **options)


def distill(hidden=H, head=W, teacher_hidden=T, teacher_head=W, **options):
    return linear_distill_loss(hidden, head, teacher_hidden, teacher_head, **options)


def kl(name="forward_kl", **options):
    return topk(divergence=name, **options)


# what, call, error, and words of the message: the argument first, then what came and what was wanted
REFUSED = [
    # shapes
    ("hidden size", lambda: topk(H[:, :7]), ValueError, ("hidden:", "[..., 8]", "[5, 7]")),
    (
        "hidden are logits",
        lambda: topk(H @ W.T),
        ValueError,
        ("hidden:", "[..., 8]", "[5, 23]; these look like"),
    ),
    (
        "logits beside a padded head",
        lambda: distill(teacher_hidden=T @ W[:20].T, teacher_head=LMHead(W, vocab_size=20)),
        ValueError,
        (
            "teacher_hidden:",
            "[5, 20]; these look like logits, wanted are the hidden states before the LM head (of a PEFT model: model.get_base_model()",
        ),
    ),
    (
        "hidden is 0-d",
        lambda: linear_topk(torch.tensor(1.0), W, 2),
        ValueError,
        ("hidden:", "[..., 8]", "[]"),
    ),
    ("weight is 1-d", lambda: linear_topk(H, W[0], 2), ValueError, ("head.weight:", "[V, D]", "[8]")),
    ("weight is 3-d", lambda: LMHead(W[None]), ValueError, ("head.weight:", "[V, D]", "[1, 23, 8]")),
    ("bias shape", lambda: LMHead(W, W[:, :2]), ValueError, ("head.bias:", "[23]", "[23, 2]")),
    ("bias length", lambda: LMHead(W, torch.zeros(8)), ValueError, ("head.bias:", "[23]", "[8]")),
    ("lead of indices", lambda: linear_gather(H, W, IDS[:3]), ValueError, ("indices:", "[5, 'K']", "[3, 4]")),
    ("flat indices", lambda: linear_gather(H, W, LABELS), ValueError, ("indices:", "'K'", "[5]")),
    ("lead of exclude", lambda: linear_logsumexp(H, W, exclude=IDS[:3]), ValueError, ("exclude:", "[3, 4]")),
    ("labels with K", lambda: linear_cross_entropy(H, W, IDS), ValueError, ("labels:", "[5]", "[5, 4]")),
    ("labels too few", lambda: linear_token_stats(H, W, LABELS[:2]), ValueError, ("labels:", "[5]", "[2]")),
    ("teacher rows", lambda: topk(H[:3]), ValueError, ("teacher.values:", "[3, 'K']", "[5, 4]")),
    (
        "teacher without ids",
        lambda: topk(teacher=TopK(torch.zeros(N, 0), torch.zeros(N, 0).long(), torch.zeros(N))),
        ValueError,
        ("teacher.values:", "K >= 1", "[5, 0]"),
    ),
    (
        "teacher ids",
        lambda: topk(teacher=TOP._replace(indices=IDS[:, :3])),
        ValueError,
        ("teacher.indices:", "[5, 3]"),
    ),
    (
        "teacher tail",
        lambda: kl(teacher=TOP._replace(tail_logsumexp=torch.zeros(2)), normalization="tail"),
        ValueError,
        ("teacher.tail_logsumexp:", "[5]", "[2]"),
    ),
    ("mask shape", lambda: topk(mask=torch.ones(3).bool()), ValueError, ("mask:", "[5]", "[3]")),
    ("weights shape", lambda: topk(weights=torch.ones(N, 1)), ValueError, ("weights:", "[5]", "[5, 1]")),
    (
        "teacher hidden rows",
        lambda: distill(teacher_hidden=T[:2]),
        ValueError,
        ("teacher_hidden:", "[5]", "[2]"),
    ),
    (
        "teacher hidden size",
        lambda: distill(teacher_hidden=T[:, :3]),
        ValueError,
        ("teacher_hidden:", "[5, 3]"),
    ),
    # types and dtypes
    ("hidden is a list", lambda: topk([1.0]), TypeError, ("hidden:", "tensor", "list")),
    ("hidden of topk is a list", lambda: linear_topk([1.0], W, 2), TypeError, ("hidden:", "tensor", "list")),
    ("hidden is None", lambda: linear_token_stats(None, W), TypeError, ("hidden:", "tensor", "NoneType")),
    ("hidden of ints", lambda: topk(torch.ones(N, D).long()), TypeError, ("hidden:", "fp32", "int64")),
    ("hidden complex", lambda: topk(H.to(torch.complex64)), TypeError, ("hidden:", "complex64")),
    ("hidden fp8", lambda: topk(H.to(torch.float8_e4m3fn)), TypeError, ("hidden:", "float8")),
    (
        "hidden in half, head in fp32",
        lambda: topk(H.half()),
        TypeError,
        ("hidden:", "float32", "float16", "autocast"),
    ),
    ("head is a module", lambda: topk(head=torch.nn.Linear(D, V)), TypeError, ("head:", "LMHead", "Linear")),
    ("teacher head is None", lambda: distill(teacher_head=None), TypeError, ("teacher_head:", "NoneType")),
    ("weight is a list", lambda: LMHead([[1.0]]), TypeError, ("head.weight:", "list")),
    (
        "weight of ints",
        lambda: LMHead(torch.ones(3, 2).int()),
        TypeError,
        ("head.weight:", "int32", "dequantise"),
    ),
    (
        "weight of fp8",
        lambda: LMHead(W.to(torch.float8_e4m3fn)),
        TypeError,
        ("head.weight:", "bf16", "float8", "dequantise"),
    ),
    ("bias is a number", lambda: LMHead(W, 1.0), ValueError, ("head.bias:", "[23]", "float")),
    (
        "bias dtype",
        lambda: LMHead(W, torch.zeros(V).half()),
        ValueError,
        ("head.bias:", "float32", "float16"),
    ),
    (
        "teacher is a slice",
        lambda: topk(teacher=TOP[:2]),
        TypeError,
        ("teacher:", "a slice of a TopK is a plain tuple"),
    ),
    (
        "teacher from a DataLoader",
        lambda: topk(teacher=TOP._replace(log_probabilities=torch.zeros(2, dtype=torch.bool))),
        TypeError,
        ("teacher.log_probabilities:", "True or False", "Tensor", "collate"),
    ),
    (
        "teacher ids of 16 bits",
        lambda: topk(teacher=TOP._replace(indices=IDS.to(torch.uint16))),
        TypeError,
        ("teacher.indices:", "int64 or int32", "uint16"),
    ),
    (
        "sampled ids of 16 bits",
        lambda: topk_distill_stats(
            H, W, TOP, token_ids=LABELS.to(torch.uint16), mask=torch.ones(N, dtype=torch.bool)
        ),
        TypeError,
        ("token_ids:", "int64 or int32", "uint16"),
    ),
    ("teacher is a tuple", lambda: topk(teacher=(TOP.values, IDS)), TypeError, ("teacher:", "TopK", "tuple")),
    (
        "teacher of ints",
        lambda: topk(teacher=TOP._replace(values=IDS)),
        TypeError,
        ("teacher.values:", "int64"),
    ),
    (
        "indices of floats",
        lambda: linear_gather(H, W, TOP.values),
        TypeError,
        ("indices:", "int64", "float32"),
    ),
    ("indices is a list", lambda: linear_gather(H, W, [[1]]), TypeError, ("indices:", "tensor", "list")),
    (
        "labels of floats",
        lambda: linear_cross_entropy(H, W, LABELS.float()),
        TypeError,
        ("labels:", "float32"),
    ),
    ("labels is None", lambda: linear_cross_entropy(H, W, None), TypeError, ("labels:", "NoneType")),
    ("mask of ints", lambda: topk(mask=torch.ones(N).long()), TypeError, ("mask:", "bool", "int64")),
    (
        "mask of floats",
        lambda: topk(mask=torch.ones(N)),
        TypeError,
        ("mask:", "bool", "the token that a position predicts", "float32"),
    ),
    ("mask is a list", lambda: topk(mask=[True] * N), TypeError, ("mask:", "tensor", "list")),
    ("weights of ints", lambda: topk(weights=torch.ones(N).long()), TypeError, ("weights:", "int64")),
    (
        "weights with grad",
        lambda: topk(weights=torch.ones(N, requires_grad=True)),
        TypeError,
        ("weights:", "grad"),
    ),
    # devices
    ("hidden on meta", lambda: topk(H.to("meta")), ValueError, ("hidden:", "cpu", "meta")),
    (
        "bias on meta",
        lambda: LMHead(W, torch.zeros(V, device="meta")),
        ValueError,
        ("head.bias:", "cpu", "meta"),
    ),
    (
        "mask on meta",
        lambda: topk(mask=torch.ones(N, device="meta").bool()),
        ValueError,
        ("mask:", "cpu", "meta"),
    ),
    (
        "teacher on meta",
        lambda: topk(teacher=TOP._replace(values=TOP.values.to("meta"))),
        ValueError,
        ("teacher.values:", "cpu", "meta"),
    ),
    ("indices on meta", lambda: linear_gather(H, W, IDS.to("meta")), ValueError, ("indices:", "cpu", "meta")),
    (
        "labels on meta",
        lambda: linear_cross_entropy(H, W, LABELS.to("meta")),
        ValueError,
        ("labels:", "cpu", "meta"),
    ),
    # k
    ("k is 0", lambda: linear_topk(H, W, 0), ValueError, ("k:", "1 to 23", "0")),
    ("k is negative", lambda: linear_topk(H, W, -3), ValueError, ("k:", "1 to 23", "-3")),
    ("k is V + 1", lambda: linear_topk(H, W, V + 1), ValueError, ("k:", "1 to 23", "24")),
    (
        "k above vocab_size",
        lambda: linear_topk(H, LMHead(W, vocab_size=9), 10),
        ValueError,
        ("k:", "1 to 9", "10"),
    ),
    ("k is numpy's 0", lambda: linear_topk(H, W, np.int64(0)), ValueError, ("k:", "1 to 23", "0")),
    ("k is numpy's True", lambda: linear_topk(H, W, np.True_), ValueError, ("k:", "integer", "True")),
    ("k is a float of numpy", lambda: linear_topk(H, W, np.float64(4)), ValueError, ("k:", "integer", "4.0")),
    ("k is a float", lambda: linear_topk(H, W, 4.0), ValueError, ("k:", "integer", "4.0")),
    ("k is True", lambda: linear_topk(H, W, True), ValueError, ("k:", "integer", "True")),
    ("k of a loss is 0", lambda: distill(k=0), ValueError, ("k:", "1 to 23", "0")),
    (
        "k above the common vocabulary",
        lambda: distill(teacher_head=W[:9], k=12),
        ValueError,
        ("k:", "1 to 9", "12"),
    ),
    # ids
    ("id too large", lambda: linear_gather(H, W, IDS + V), ValueError, ("indices:", "[0, 23)")),
    ("id negative", lambda: linear_gather(H, W, IDS - V), ValueError, ("indices:", "[0, 23)", "-")),
    (
        "id in the padding",
        lambda: linear_gather(H, LMHead(W, vocab_size=2), IDS),
        ValueError,
        ("indices:", "[0, 2)"),
    ),
    ("excluded id", lambda: linear_logsumexp(H, W, exclude=IDS + V), ValueError, ("exclude:", "[0, 23)")),
    (
        "label too large",
        lambda: linear_cross_entropy(H, W, LABELS + V),
        ValueError,
        ("labels:", "[0, 23)", "-100"),
    ),
    (
        "label negative",
        lambda: linear_cross_entropy(H, W, LABELS - 2),
        ValueError,
        ("labels:", "ignore_index", "-2"),
    ),
    *(
        (f"ignore_index {name}", call, TypeError, ("ignore_index:", "integer", repr(value)))
        for name, value, call in (
            ("None", None, lambda: linear_cross_entropy(H, W, LABELS, ignore_index=None)),
            ("1.5", 1.5, lambda: linear_cross_entropy(H, W, LABELS, ignore_index=1.5)),
            ("of stats", 1.5, lambda: linear_token_stats(H, W, LABELS, ignore_index=1.5)),
            ("of the module", "x", lambda: LinearCrossEntropyLoss(ignore_index="x")),
        )
    ),
    ("stats of label -100", lambda: linear_token_stats(H, W, LABELS - 100), ValueError, ("labels:", "-100")),
    (
        "stats of label -2 beside ignored ones",
        lambda: linear_token_stats(H, W, LABELS - 2, ignore_index=-100),
        ValueError,
        ("labels:", "ignore_index=-100", "-2"),
    ),
    (
        "teacher id",
        lambda: topk(teacher=TOP._replace(indices=IDS + V)),
        ValueError,
        ("teacher.indices:", "[0, 23)"),
    ),
    # options
    (
        "divergence",
        lambda: topk(divergence="hubr"),
        ValueError,
        ("divergence:", "'hubr'", "did you mean 'huber'"),
    ),
    (
        "divergence kl",
        lambda: distill(divergence="forwardkl"),
        ValueError,
        ("divergence:", "forward_kl", "did you"),
    ),
    (
        "normalization",
        lambda: kl(normalization="renorm"),
        ValueError,
        ("normalization:", "did you mean 'renormalize'"),
    ),
    ("support", lambda: distill(k=3, support="students"), ValueError, ("support:", "did you mean 'student'")),
    ("reduction", lambda: topk(reduction="batchmean"), ValueError, ("reduction:", "did you mean 'mean'")),
    ("impl", lambda: topk(impl="cuda"), ValueError, ("impl:", "triton", "'cuda'")),
    ("op", lambda: resolve_impl("linear_topp", "cpu"), ValueError, ("op:", "linear_topk", "'linear_topp'")),
    ("dtype", lambda: resolve_impl("linear_topk", "cpu", torch.int8), ValueError, ("dtype:", "int8")),
    ("beta 0", lambda: kl("jsd", beta=0.0), ValueError, ("beta:", "(0, 1)", "0.0", "forward_kl")),
    ("beta 1", lambda: kl("jsd", beta=1), ValueError, ("beta:", "(0, 1)", "1")),
    ("beta a string", lambda: kl("jsd", beta="half"), ValueError, ("beta:", "'half'")),
    ("beta nan", lambda: kl("jsd", beta=float("nan")), ValueError, ("beta:", "nan")),
    ("delta 0", lambda: topk(delta=0.0), ValueError, ("delta:", "> 0", "0.0")),
    ("delta negative", lambda: topk(delta=-1.0), ValueError, ("delta:", "> 0", "-1.0")),
    ("delta infinite", lambda: topk(delta=float("inf")), ValueError, ("delta:", "finite", "inf")),
    (
        "temperature with huber",
        lambda: topk(temperature=2.0),
        ValueError,
        ("temperature:", "huber", "1.0", "2.0"),
    ),
    ("temperature 0", lambda: kl(temperature=0.0), ValueError, ("temperature:", "> 0", "0.0")),
    (
        "temperature negative",
        lambda: linear_topk(H, W, 2, temperature=-1.0),
        ValueError,
        ("temperature:", "> 0", "-1"),
    ),
    (
        "temperature infinite",
        lambda: linear_logsumexp(H, W, temperature=float("inf")),
        ValueError,
        ("temperature:",),
    ),
    *(
        (f"temperature {t:g} of {name}", call, ValueError, ("temperature:", "0.001 to 1000", f"{t!r}"))
        for t in (1e300, 1e-10)
        for name, call in {
            "kl": lambda t=t: kl(temperature=t),
            "dense": lambda t=t: distill(temperature=t),
            "topk": lambda t=t: linear_topk(H, W, 2, temperature=t),
            "logsumexp": lambda t=t: linear_logsumexp(H, W, temperature=t),
        }.items()
    ),
    ("delta 1e-300", lambda: topk(delta=1e-300), ValueError, ("delta:", "1e-10 to 1e+10", "1e-300")),
    ("beta 1e-300", lambda: kl("jsd", beta=1e-300), ValueError, ("beta:", "(0, 1)", "0.001 to", "1e-300")),
    ("softcap 1e-20", lambda: LMHead(W, softcap=1e-20), ValueError, ("head.softcap:", "0.0001 to", "1e-20")),
    ("scale 1e300", lambda: LMHead(W, scale=-1e300), ValueError, ("head.scale:", "to 10000", "-1e+300")),
    ("temperature a string", lambda: kl(temperature="2"), ValueError, ("temperature:", "'2'")),
    (
        "temperature a tensor",
        lambda: kl(temperature=torch.tensor(2.0)),
        ValueError,
        ("temperature:", "tensor"),
    ),
    (
        "normalization with huber",
        lambda: topk(normalization="tail"),
        ValueError,
        ("normalization:", "raw", "'tail'"),
    ),
    (
        "zeroed reverse",
        lambda: kl("reverse_kl", normalization="zeroed"),
        ValueError,
        ("normalization:", "forward_kl"),
    ),
    (
        "truncated jsd",
        lambda: kl("jsd", normalization="truncated"),
        ValueError,
        ("normalization:", "'forward_kl', 'reverse_kl' only"),
    ),
    (
        "generalized without the teacher's tail",
        lambda: kl("reverse_kl", normalization="generalized", teacher=TOP._replace(tail_logsumexp=None)),
        ValueError,
        ("teacher.tail_logsumexp:", "'generalized' reads it", "got None"),
    ),
    (
        "dense with a tail",
        lambda: distill(normalization="tail"),
        ValueError,
        ("normalization:", "k=None", "'tail'"),
    ),
    ("dense with a support", lambda: distill(support="union"), ValueError, ("support:", "k=None", "'union'")),
    (
        "teacher at another temperature",
        lambda: kl(normalization="tail", teacher=WARM),
        ValueError,
        ("teacher.temperature:", "2.0", "wanted 1.0"),
    ),
    (
        "teacher at the default temperature",
        lambda: kl(normalization="truncated", temperature=2.0),
        ValueError,
        ("teacher.temperature:", "1.0", "wanted 2.0"),
    ),
    # gradients
    (
        "teacher hidden with grad",
        lambda: distill(teacher_hidden=GRAD),
        ValueError,
        ("teacher_hidden:", "detach()"),
    ),
    (
        "teacher values with grad",
        lambda: topk(teacher=TOP._replace(values=linear_gather(GRAD, W, IDS))),
        ValueError,
        ("teacher.values:", "no gradient", "detached"),
    ),
    # num_items
    (
        "num_items with sum",
        lambda: topk(num_items=3, reduction="sum"),
        ValueError,
        ("num_items:", "mean", "'sum'"),
    ),
    (
        "num_items with none",
        lambda: topk(num_items=3, reduction="none"),
        ValueError,
        ("num_items:", "'none'"),
    ),
    ("num_items negative", lambda: topk(num_items=-3), ValueError, ("num_items:", ">= 0", "-3")),
    (
        "num_items a negative tensor",
        lambda: topk(num_items=torch.tensor(-3)),
        ValueError,
        ("num_items:", ">= 0", "-3"),
    ),
    ("num_items nan", lambda: topk(num_items=torch.tensor(float("nan"))), ValueError, ("num_items:", "nan")),
    ("vocab_size a bool", lambda: LMHead(W, vocab_size=True), ValueError, ("head.vocab_size:", "True")),
    *(
        (
            f"num_items = {number!r}",
            lambda n=number: topk(num_items=n),
            ValueError,
            ("num_items:", ">= 0", repr(number)),
        )
        for number in (-0.5, float("inf"), float("nan"), 1e300, np.float32("inf"), True, np.True_, "2.5")
    ),
    ("num_items a vector", lambda: topk(num_items=torch.ones(3)), ValueError, ("num_items:", "0-d", "[3]")),
    # head
    ("softcap 0", lambda: LMHead(W, softcap=0.0), ValueError, ("head.softcap:", "> 0", "0.0")),
    (
        "softcap infinite",
        lambda: LMHead(W, softcap=float("inf")),
        ValueError,
        ("head.softcap:", "finite", "inf"),
    ),
    ("softcap a string", lambda: LMHead(W, softcap="30"), ValueError, ("head.softcap:", "'30'")),
    ("scale 0", lambda: LMHead(W, scale=0.0), ValueError, ("head.scale:", "other than 0", "0.0")),
    ("scale nan", lambda: LMHead(W, scale=float("nan")), ValueError, ("head.scale:", "finite", "nan")),
    ("scale a tensor", lambda: LMHead(W, scale=torch.tensor(2.0)), ValueError, ("head.scale:", "tensor")),
    ("vocab_size 0", lambda: LMHead(W, vocab_size=0), ValueError, ("head.vocab_size:", "1 to 23", "0")),
    (
        "vocab_size too large",
        lambda: LMHead(W, vocab_size=24),
        ValueError,
        ("head.vocab_size:", "1 to 23", "24"),
    ),
    (
        "vocab_size a float",
        lambda: LMHead(W, vocab_size=5.0),
        ValueError,
        ("head.vocab_size:", "integer", "5.0"),
    ),
    # implementations and settings
    ("workspace 1", lambda: set_workspace_bytes(1), ValueError, ("num_bytes:", "1 MiB", "1")),
    (
        "workspace a float",
        lambda: set_workspace_bytes(2.0**28),
        ValueError,
        ("num_bytes:", "integer", "268435456.0"),
    ),
    (
        "module options",
        lambda: TopKDistillLoss(divergence="mes"),
        ValueError,
        ("divergence:", "did you mean 'mse'"),
    ),
    *(
        (
            f"module {name} {value}",
            lambda options={name: value}: LinearDistillLoss(**options),
            ValueError,
            (f"{name}:", repr(value)),
        )
        for name, value in (
            ("reduction", "avg"),
            ("support", "all"),
            ("impl", "cuda"),
            ("k", 0),
            ("k", True),
            ("k", 2.0),
        )
    ),
    *(
        (
            f"dense module {name}",
            lambda options={name: value}: LinearDistillLoss(**options),
            ValueError,
            (f"{name}:", "k=None"),
        )
        for name, value in (("normalization", "tail"), ("clip", 1.0), ("support", "union"))
    ),
    # numbers that no tensor holds, and what only looks like a number
    (
        "num_items inf",
        lambda: topk(num_items=torch.tensor(torch.inf)),
        ValueError,
        ("num_items:", "finite", "inf"),
    ),
    (
        "num_items a bool tensor",
        lambda: topk(num_items=torch.tensor(True)),
        ValueError,
        ("num_items:", "torch.bool"),
    ),
    ("num_items 10**39", lambda: topk(num_items=10**39), ValueError, ("num_items:", "64 bits", "1000000000")),
    ("delta 10**400", lambda: topk(delta=10**400), ValueError, ("delta:", "finite", "2^1329")),
    ("delta 10**5000 where it is not read", lambda: kl(delta=10**5000), ValueError, ("delta:", "2^16610")),
    ("beta 10**400", lambda: kl("jsd", beta=10**400), ValueError, ("beta:", "2^1329")),
    ("scale 10**400", lambda: LMHead(W, scale=10**400), ValueError, ("head.scale:", "2^1329")),
    *(
        (f"ignore_index {name}", call, TypeError, ("ignore_index:", "integer"))
        for name, call in (
            ("True", lambda: linear_cross_entropy(H, W, LABELS, ignore_index=True)),
            ("True of stats", lambda: linear_token_stats(H, W, LABELS, ignore_index=True)),
            ("True of the module", lambda: LinearCrossEntropyLoss(ignore_index=True)),
            ("2**70", lambda: linear_cross_entropy(H, W, LABELS, ignore_index=2**70)),
            ("2**70 of the module", lambda: LinearCrossEntropyLoss(ignore_index=2**70)),
        )
    ),
    ("divergence a list", lambda: topk(divergence=["mse"]), ValueError, ("divergence:", "huber", "['mse']")),
    # tails and layouts
    *(
        (
            f"tail of {dtype}",
            lambda dtype=dtype: kl(
                normalization="tail", teacher=TOP._replace(tail_logsumexp=torch.ones(N, dtype=dtype))
            ),
            TypeError,
            ("teacher.tail_logsumexp:", "floating-point", str(dtype)),
        )
        for dtype in (torch.bool, torch.int64, torch.complex64)
    ),
    (
        "tail of stats a string",
        lambda: topk_distill_stats(H, W, TOP._replace(tail_logsumexp="x")),
        TypeError,
        ("teacher.tail_logsumexp:", "str"),
    ),
    (
        "tail of stats int64",
        lambda: topk_distill_stats(H, W, TOP._replace(tail_logsumexp=LABELS)),
        TypeError,
        ("teacher.tail_logsumexp:", "int64"),
    ),
    (
        "teacher.temperature a tensor",
        lambda: topk(teacher=TOP._replace(temperature=torch.ones(2))),
        ValueError,
        ("teacher.temperature:", "tensor"),
    ),
    ("hidden is sparse", lambda: topk(H.to_sparse()), TypeError, ("hidden:", "dense", "sparse_coo")),
    ("hidden is nested", lambda: topk(NESTED), TypeError, ("hidden:", "dense", "nested")),
    ("weight is sparse", lambda: LMHead(W.to_sparse()), TypeError, ("head.weight:", "dense", "sparse_coo")),
    ("weight is nested", lambda: LMHead(NESTED), TypeError, ("head.weight:", "dense", "nested")),
    ("no ids at all", lambda: linear_logsumexp(H, W[:0]), ValueError, ("head.weight:", "V >= 1", "[0, 8]")),
    (
        "no ids of the student",
        lambda: distill(head=LMHead(W[:0])),
        ValueError,
        ("student_head.weight:", "V >= 1", "[0, 8]"),
    ),
    (
        "log-probabilities beside a NaN",
        lambda: TopK.from_logprobs(IDS[:2, :1], torch.tensor([[torch.nan], [0.7]])),
        ValueError,
        ("logprobs:", "a sum of 2.01"),
    ),
    (
        "cross-entropy module",
        lambda: LinearCrossEntropyLoss(reduction="avg"),
        ValueError,
        ("reduction:", "'avg'"),
    ),
    (
        "distill module options",
        lambda: LinearDistillLoss(divergence="jsd", beta=2.0),
        ValueError,
        ("beta:", "(0, 1)", "2.0"),
    ),
]


@pytest.mark.parametrize(
    "what, call, error, words", REFUSED, ids=[row[0].replace(" ", "-") for row in REFUSED]
)
def test_refused(what, call, error, words):
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    for word in words:
        assert word in message, f"{what}: no {word!r} in {message!r}"
    if words and words[0].endswith(":"):
        assert message.startswith(words[0]), f"the message begins with the argument: {message!r}"
    assert "\n" not in message and len(message) < 300


def test_the_table():
    names = [row[0] for row in REFUSED]
    assert len(names) >= 40 and len(set(names)) == len(names)


def test_a_refusal_leaves_nothing_behind():
    """No gradient, no changed setting after an error."""
    hidden, weight = H.clone().requires_grad_(), W.clone().requires_grad_()
    before = set_workspace_bytes(2**22)
    try:
        for call in (
            lambda: topk_distill_loss(hidden, weight, TOP, mask=torch.ones(3).bool()).backward(),
            lambda: set_workspace_bytes(0),
        ):
            with pytest.raises(ValueError):
                call()
        assert hidden.grad is None and weight.grad is None
        assert set_workspace_bytes(None) == 2**22
    finally:
        set_workspace_bytes(before)


# --- odd, and answered -----------------------------------------------------------------------------------------

INFINITE = H.clone()
INFINITE[1, 0] = torch.inf
NAN = H.clone()
NAN[1, 0] = torch.nan
LOSSES = {
    "huber": topk,
    "renormalize": lambda **o: kl(**o),
    "tail": lambda **o: kl("jsd", normalization="tail", **o),
    "zeroed": lambda **o: kl(normalization="zeroed", **o),
    "truncated": lambda **o: kl(normalization="truncated", **o),
    "generalized": lambda **o: kl("reverse_kl", normalization="generalized", **o),
    "dense": distill,
    "dense-mse": lambda **o: distill(divergence="mse", **o),
    "union": lambda **o: distill(k=3, support="union", **o),
    "cross-entropy": lambda hidden=H, **o: linear_cross_entropy(hidden, W, LABELS, **o),
}


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [INFINITE, NAN], ids=["inf", "nan"])
def test_hidden_states_that_are_not_numbers(name, impl, bad):
    """NaN or infinite for that token, never a wrong finite number; the other tokens as ever."""
    got = LOSSES[name](hidden=bad, reduction="none", impl=impl)
    wanted = LOSSES[name](reduction="none", impl=impl)
    assert not bool(got[1].isfinite())
    others = torch.arange(N) != 1
    assert torch.equal(got[others], wanted[others])


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "cross-entropy"])
def test_documented_answers(name):
    loss = LOSSES[name]
    full = loss(reduction="none")
    # No token counted: 0, whatever the denominator.
    nobody = torch.zeros(N, dtype=torch.bool)
    for options in ({}, {"num_items": 7}, {"num_items": 0}, {"reduction": "sum"}):
        assert loss(mask=nobody, **options) == 0
    # num_items of any number type; 0 items are 1.
    for items in (torch.tensor(4), torch.tensor(4.0), torch.tensor([4]), 4, 4.0, np.int64(4), Fraction(4)):
        torch.testing.assert_close(loss(num_items=items), full.sum() / 4)
    for items in (torch.tensor(0.5), 0.5, np.float32(0.5), Fraction(1, 2)):
        torch.testing.assert_close(loss(num_items=items), full.sum() / 0.5)
    for items in (0, 0.0, torch.tensor(0.0)):
        torch.testing.assert_close(loss(num_items=items), full.sum())
    # int32 ids, and a teacher of another float type.
    teacher = TOP._replace(values=TOP.values.double(), indices=IDS.int())
    if name in ("huber", "renormalize", "tail", "zeroed", "truncated", "generalized"):
        assert torch.equal(loss(teacher=teacher, reduction="none"), full)
    # Weights of 0 are a mask that still counts in the denominator.
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, -1.0])
    torch.testing.assert_close(loss(weights=weights), (full * weights).sum() / N)


def test_any_number_that_a_float_can_hold_is_an_option():
    """Fractions and numpy's numbers, though no op takes them."""
    half = Fraction(1, 2)
    top = linear_topk(H, LMHead(W, softcap=Fraction(30), scale=half), 2, temperature=half)
    wanted = linear_topk(H, LMHead(W, softcap=30.0, scale=0.5), 2, temperature=0.5)
    assert (
        all(torch.equal(a, b) for a, b in zip(top[:3], wanted[:3], strict=True))
        and type(top.temperature) is float
    )
    assert torch.equal(linear_logsumexp(H, W, temperature=half), linear_logsumexp(H, W, temperature=0.5))
    options = {"divergence": "jsd", "temperature": half, "beta": half, "clip": Fraction(3)}
    assert torch.equal(topk(**options), topk(divergence="jsd", temperature=0.5, beta=0.5, clip=3.0))


def test_integers_of_numpy_are_integers():
    k, head = np.int64(3), LMHead(W, vocab_size=np.int32(20))
    wanted = linear_topk(H, W[:20], 3).indices
    assert torch.equal(linear_topk(H, head, k).indices, wanted) and type(head.num_ids) is int
    custom = torch.func.vmap(lambda h: linear_topk(h, head, k).indices)
    assert torch.equal(custom(H[None])[0], wanted)
    assert distill(k=k) == LinearDistillLoss(k=k)(H, W, T, W) == distill(k=3)


def test_a_weight_that_lies_on_its_side_is_not_called_logits():
    with pytest.raises(ValueError, match=r"^hidden: wanted shape \[\.\.\., 23\] .* got \[5, 8\]$"):
        linear_topk(H, W.T, 2)


def test_teacher_hidden_with_grad_under_no_grad_is_fine():
    with torch.no_grad():
        assert distill(teacher_hidden=GRAD).isfinite()


def test_a_teacher_head_gets_no_gradient():
    head = W.clone().requires_grad_()
    hidden = H.clone().requires_grad_()
    linear_distill_loss(hidden, W, T, head).backward()
    assert head.grad is None and hidden.grad is not None


def test_a_bare_weight_is_a_head():
    assert torch.equal(topk(head=LMHead(W)), topk(head=W))


def test_teacher_at_another_temperature_where_its_tail_is_not_read():
    assert topk(teacher=WARM).isfinite() and kl(teacher=WARM, temperature=3.0).isfinite()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_an_infinite_number_of_numpy_is_infinite(kind):
    assert linear_topk(H, W, 2, temperature=kind(2)).temperature == 2.0
    with pytest.raises(ValueError, match="temperature: wanted a finite number > 0, got"):
        TopK.from_logprobs(torch.tensor([[0]]), torch.tensor([[-1.0]]), temperature=kind("inf"))
