"""duet.methods.objectives: every loss against its formula on full logits, in fp64; one function and one line add another."""

import pytest
import torch
import torch.nn.functional as F

from duet import DuetConfig
from duet.methods.objectives import (
    OBJECTIVES,
    Counts,
    Objective,
    Step,
    answer_nll,
    check_options,
    find_objective,
    teacher_topk,
)
from duet_kernels import LMHead, linear_topk

B, P, D, V, K = 5, 3, 8, 40, 6


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    labels = torch.randint(0, V, (B, P), generator=g).masked_fill(~mask, -100)
    forget = torch.tensor([True, False, True, False, False])
    return {
        "hidden": draw(B, P, D),
        "teacher_hidden": draw(B, P, D),
        "weight": draw(V, D),
        "teacher_weight": draw(V, D),
        "labels": labels,
        "mask": mask,
        "forget": forget,
    }


def counts_of(objective, mask, forget):
    query = torch.arange(B).unsqueeze(-1).expand(B, P)[mask]
    inputs = {"query": query, "forget": forget, "targets": {"pushed": forget[query]}}
    return Counts.of(objective.count(inputs))


def run(name, problem, hidden=None, **options):
    objective = OBJECTIVES[name]
    args = DuetConfig(output_dir="unused", objective=name, k=K, **options)
    head = LMHead(problem["weight"])
    targets = None
    if objective.targets:
        teacher = (problem["teacher_hidden"][problem["mask"]], LMHead(problem["teacher_weight"]))
        targets = objective.targets(*teacher, problem["labels"][problem["mask"]], args)
    if objective.positions == "prepared":
        targets = prepared(problem)
    hidden = problem["hidden"] if hidden is None else hidden
    mask, forget = problem["mask"], problem["forget"]
    query = torch.arange(B).unsqueeze(-1).expand(B, P)[mask]
    return objective.loss(
        Step(
            hidden[mask],
            head,
            targets,
            problem["labels"][mask],
            query,
            forget,
            counts_of(objective, mask, forget),
            args,
        )
    )


def prepared(problem):
    """What `Objective.prepare` puts beside the rows, with the teacher's numbers: the forget rows are pushed, some tokens known."""
    mask, labels = problem["mask"], problem["labels"][problem["mask"]]
    student, teacher = (z[mask].log_softmax(-1) for z in logits(problem))
    top = linear_topk(problem["teacher_hidden"][mask], problem["teacher_weight"], K)
    pushed = problem["forget"].unsqueeze(-1).expand(B, P)[mask]
    own = student.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return {
        "values": top.values,
        "indices": top.indices,
        "tail": top.tail_logsumexp,
        "pushed": pushed,
        "known": pushed & (torch.arange(len(pushed)) % 2 == 0),
        "base": teacher.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "floor": own + torch.where(torch.arange(len(own)) % 4 == 0, 0.5, -0.5),  # some lie above, some below
    }


def logits(problem):
    return problem["hidden"] @ problem["weight"].T, problem["teacher_hidden"] @ problem["teacher_weight"].T


def expected_distillation(name, problem, temperature, beta, delta):
    student, teacher = logits(problem)
    best, ids = teacher.topk(K)
    chosen = student.gather(-1, ids)
    if name in ("duet", "duet_adversarial"):
        return F.huber_loss(chosen, best, delta=delta, reduction="none").sum(-1)
    log_p, log_q = (best / temperature).log_softmax(-1), (chosen / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = (beta * p + (1 - beta) * q).log()
    return {
        "duet_kl": (p * (log_p - log_q)).sum(-1),
        "duet_forward_kl": (p * (log_p - log_q)).sum(-1),
        "duet_reverse_kl": (q * (log_q - log_p)).sum(-1),
        "duet_symmetric_kl": beta * (p * (log_p - log_q)).sum(-1)
        + (1 - beta) * (q * (log_q - log_p)).sum(-1),
        "duet_jsd": (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "duet",
        "duet_adversarial",
        "duet_kl",
        "duet_forward_kl",
        "duet_reverse_kl",
        "duet_symmetric_kl",
        "duet_jsd",
    ],
)
def test_distillation_objectives(name, problem):
    options = {"delta": 0.7} if name in ("duet", "duet_adversarial") else {"temperature": 2.0, "beta": 0.3}
    parts = run(name, problem, **options)
    per_position = expected_distillation(name, problem, options.get("temperature"), options.get("beta"), 0.7)
    mask, forget = problem["mask"], problem["forget"]
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(parts["loss"], per_position[mask].mean(), **close)
    torch.testing.assert_close(parts["forget_loss"], per_position[forget][mask[forget]].mean(), **close)
    torch.testing.assert_close(parts["retain_loss"], per_position[~forget][mask[~forget]].mean(), **close)


def test_the_tail_bucket_sees_the_rest_of_the_vocabulary(problem):
    parts = run("duet_forward_kl", problem, normalization="tail")
    student, teacher = logits(problem)
    p, q = teacher.softmax(-1), student.softmax(-1)
    ids = teacher.topk(K).indices
    p, q = p.gather(-1, ids), q.gather(-1, ids)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    expected = (p * (p / q).log()).sum(-1)[problem["mask"]].mean()
    torch.testing.assert_close(parts["loss"], expected, rtol=1e-8, atol=1e-10)


def test_a_clip_limits_what_one_id_adds(problem):
    limit = 0.01
    student, teacher = logits(problem)
    best, ids = teacher.topk(K)
    p, q = best.softmax(-1), student.gather(-1, ids).softmax(-1)
    terms = p * (p / q).log() - p + q
    expected = terms.clamp(max=limit).sum(-1)[problem["mask"]].mean()
    assert (terms > limit).any() and (terms < limit).any()
    torch.testing.assert_close(run("duet_kl", problem, clip=limit)["loss"], expected, rtol=1e-9, atol=1e-12)


def test_gradient_difference(problem):
    parts = run("graddiff", problem, retain_weight=0.5)
    student, _ = logits(problem)
    nll = F.cross_entropy(student.transpose(1, 2), problem["labels"], ignore_index=-100, reduction="none")
    mask, forget = problem["mask"], problem["forget"]
    forget_loss = -nll[forget].sum() / mask[forget].sum()
    retain_loss = nll[~forget].sum() / mask[~forget].sum()
    torch.testing.assert_close(parts["forget_loss"], forget_loss)
    torch.testing.assert_close(parts["loss"], forget_loss + 0.5 * retain_loss)
    alone = run("ga", problem)
    torch.testing.assert_close(alone["loss"], forget_loss)
    torch.testing.assert_close(alone["retain_loss"], retain_loss)


def test_npo_uses_log_probabilities_of_whole_answers(problem):
    parts = run("npo", problem, npo_beta=0.4, retain_weight=2.0)
    student, teacher = logits(problem)
    mask, forget, labels = problem["mask"], problem["forget"], problem["labels"].clamp(min=0)

    def sequence(z):
        return (z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) * mask).sum(-1)

    per_query = -2 / 0.4 * F.logsigmoid(-0.4 * (sequence(student) - sequence(teacher)))
    nll = -student.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(parts["forget_loss"], per_query[forget].mean())
    torch.testing.assert_close(
        parts["loss"], per_query[forget].mean() + 2 * nll[~forget][mask[~forget]].mean()
    )


@pytest.mark.parametrize("name", [name for name, each in OBJECTIVES.items() if each.loss is not None])
def test_gradients_are_those_of_autograd_on_full_logits(name, problem):
    hidden = problem["hidden"].clone().requires_grad_()
    run(name, problem, hidden)["loss"].backward()
    assert torch.isfinite(hidden.grad).all() and hidden.grad[problem["mask"]].abs().sum() > 0
    step = 1e-6
    for b, p, d in ((0, 0, 0), (2, 1, 3), (3, 2, 5)):
        ahead, behind = problem["hidden"].clone(), problem["hidden"].clone()
        ahead[b, p, d] += step
        behind[b, p, d] -= step
        slope = (run(name, problem, ahead)["loss"] - run(name, problem, behind)["loss"]) / (2 * step)
        torch.testing.assert_close(hidden.grad[b, p, d], slope, rtol=1e-5, atol=1e-7)


def test_a_nan_row_is_not_hidden_by_the_split_into_forget_and_retain(problem):
    problem["hidden"][0, 0] = float("nan")
    parts = run("duet", problem)
    assert parts["loss"].isnan() and parts["forget_loss"].isnan() and parts["retain_loss"].isfinite()


def test_one_function_and_one_line_add_an_objective(problem, monkeypatch):
    def push_down(step: Step):
        nll = answer_nll(step.hidden, step.head, step.labels, step.args)
        return {"loss": (-nll).exp().sum() / step.counts.positions}

    monkeypatch.setitem(OBJECTIVES, "push_down", Objective(push_down, needs_answers=True))
    assert 0 < run("push_down", problem)["loss"] < 1
    assert find_objective("push_down").positions == "answer"


def test_names():
    assert find_objective("duet").targets is teacher_topk and find_objective("duet").positions == "first"
    with pytest.raises(ValueError, match="did you mean 'duet_jsd'"):
        find_objective("duet_jds")


# -- which options an objective reads ---------------------------------------------------------------------------------


class Watched:
    """A DuetConfig that remembers which options were looked at."""

    def __init__(self, args):
        self.args, self.seen = args, set()

    def __getattr__(self, name):
        self.seen.add(name)
        return getattr(self.args, name)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"in_context"}))
def test_an_objective_reads_what_it_says(monkeypatch, problem, name):
    watched, make = [], DuetConfig

    def watch(**options):
        watched.append(Watched(make(**options)))
        return watched[-1]

    monkeypatch.setitem(globals(), "DuetConfig", watch)
    run(name, problem)
    # `teacher_topk` hands `temperature` on, which DuetConfig holds at 1 for raw logits.
    others = {"impl", "seed", "temperature"} if OBJECTIVES[name].raw_logits else {"impl", "seed"}
    assert watched[0].seen - others <= set(OBJECTIVES[name].reads)


READERS = [name for name, each in OBJECTIVES.items() if "temperature" in each.reads]


@pytest.mark.parametrize("option, value", [("temperature", 3.0), ("normalization", "tail"), ("clip", 0.5)])
@pytest.mark.parametrize("name", ["undial", "npo", "ga", "undo", "duet_deep", "in_context"])
def test_an_option_that_would_be_ignored_is_refused(name, option, value):
    args = DuetConfig(output_dir="unused", objective=name, **{option: value})
    readers = f"read by {', '.join(READERS)}"
    with pytest.raises(
        ValueError, match=f"^{option}: objective '{name}' does not read it; .* got {value!r} .*{readers}"
    ):
        check_options(OBJECTIVES[name], args)


@pytest.mark.parametrize("name", READERS)
def test_an_option_that_is_read_is_not_refused(name):
    assert {"duet_kl", "duet_jsd"} <= set(READERS)
    check_options(
        OBJECTIVES[name],
        DuetConfig(output_dir="unused", objective=name, temperature=3.0, normalization="tail", clip=0.1, k=7),
    )
    check_options(
        Objective(lambda step: {}), DuetConfig(output_dir="unused", objective="mine", temperature=3.0)
    )
