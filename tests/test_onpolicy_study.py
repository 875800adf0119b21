"""The study of on-policy losses: its estimators are what they are called, and the committed page is that of the rows."""

import json

import pytest
import torch

from benchmarks.studies import onpolicy
from benchmarks.studies.runner import rows_of_seeds, run_seeds


def test_a_short_run(tmp_path, monkeypatch):
    monkeypatch.setattr(onpolicy, "QUESTIONS", 4)
    monkeypatch.setattr(onpolicy, "ASKED", 4)
    ended = run_seeds([7], tmp_path, lambda seed: onpolicy.run_seed(seed, rollouts=2, steps=1))
    assert ended == ([], [])
    (row,) = rows_of_seeds(tmp_path).values()
    assert row["gradients"]["exact"]["bias"] == 0 and row["gradients"]["exact"]["cosine"] == pytest.approx(
        1, abs=1e-3
    )
    assert set(row["trained"]) == set(row["gradients"]) == set(onpolicy.ARMS)
    assert abs(row["teacher"]["reverse_kl"]) < 1e-5 < row["damaged"]["reverse_kl"]
    assert "| the drawn token alone |" in onpolicy.page([row])


def test_the_page_is_that_of_the_rows():
    rows = list(rows_of_seeds(onpolicy.OUT).values())
    assert (onpolicy.OUT / onpolicy.PAGE).read_text() == onpolicy.page(rows)
    assert {(row["seed"], row["rollouts"], row["steps"]) for row in rows} == {
        (seed, onpolicy.ROLLOUTS, onpolicy.STEPS) for seed in onpolicy.SEEDS
    }


def test_a_batch_predicts_the_drawn_tokens():
    """The hidden states are those that the tokens were drawn from: the greedy token is the likeliest at its place."""
    pair = onpolicy.Pair(0)
    with torch.no_grad():
        batch = pair.rollout(pair.teacher, pair.held[:3], 0)
        logits = batch.hidden @ batch.head.weight.T
    assert (logits.argmax(-1) == batch.tokens).float().mean() > 0.7  # the base is sure of most words
    assert torch.equal(batch.hidden, batch.teacher_hidden)


def test_the_mean_over_all_tokens_of_the_sampled_gradient_is_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(1, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    hidden.requires_grad_()
    head = onpolicy.LMHead(weight)

    def gradient(loss, token):
        batch = onpolicy.Batch(hidden, head, taught, head, torch.tensor([token]))
        return torch.autograd.grad(loss(batch), hidden)[0]

    q = (hidden.detach() @ weight.T).softmax(-1)[0]
    mean = sum(q[token] * gradient(onpolicy.sampled, token) for token in range(9))
    torch.testing.assert_close(mean, gradient(onpolicy.exact, 0))


def test_bias_and_noise_of_known_gradients():
    """g = d + a constant + a sign that changes from batch to batch: the constant is the bias, the sign is noise."""
    exact, sums = torch.tensor([3.0, 4.0]), onpolicy.Sums()
    for number in range(1000):
        sign = torch.tensor([0.0, 2.0 if number % 2 else -2.0])
        sums.add(exact + torch.tensor([1.0, 0.0]) + sign, exact)
    found = sums.compared(exact, 1000)
    assert found["bias"] == pytest.approx(0.2, abs=1e-3) and found["noise"] == pytest.approx(0.4, abs=1e-3)
    assert found["cosine"] == pytest.approx(float(torch.tensor([4.0, 4.0]) @ exact / (32**0.5 * 5)), abs=1e-3)


def test_the_verdict_follows_from_the_rows():
    known = {name: {"bias": 0.1, "noise": 1.0, "cosine": 1.0} for name in onpolicy.ARMS}
    known["sampled"] = {"bias": 0.0, "noise": 3.0, "cosine": 0.9}
    known["teacher"] = {"bias": 0.5, "noise": 1.0, "cosine": 0.5}
    after = {name: {"reverse_kl": 2.0, "recall": 0.0} for name in onpolicy.ARMS}
    after |= {"exact": {"reverse_kl": 1.0}, "student_tail": {"reverse_kl": 1.05}}
    assert onpolicy.verdicts([json.loads(json.dumps({"gradients": known, "trained": after}))]) == [
        "* Reverse KL after training, the lowest first: the whole vocabulary (1.000); student's k, `tail` (1.050); "
        "the drawn token alone (2.000); teacher's k, `renormalize` (2.000); student's k, `renormalize` (2.000); "
        "teacher's k, `tail` (2.000); student's k, `truncated` (2.000); student's k, `generalized` (2.000).",
        "* Least bias: the drawn token alone (0.00); most: teacher's k, `renormalize` (0.50).",
        "* Most noise: the drawn token alone, 3.0 times that of the exact loss.",
    ]
    with pytest.raises(ValueError, match="rows: wanted at least one row"):
        onpolicy.page([])
