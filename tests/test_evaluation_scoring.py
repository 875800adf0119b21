"""Teacher-forced scores, ranks and greedy continuations against the model's own full logits."""

import numpy as np
import pytest
import torch
from tiny_models import merging_tokenizer, tiny, word_tokenizer

from duet.evaluation import scoring
from duet.evaluation.generation import Continuation, answers_to, continuations, cut_at
from duet.evaluation.scoring import Forced

BATCH = [Forced([1, 9, 12], [20, 21, 22, 2]), Forced([1, 30, 31, 32, 33], [40]), Forced([7], [8, 7])]


def own_logits(model, item):
    """`[L, V]` logits of the answer's tokens, one sequence at a time, without padding."""
    ids = torch.tensor([[*item.prompt, *item.answer]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    return logits[len(item.prompt) - 1 : -1]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "neox"])
def test_scores_are_the_models_own(architecture):
    model = tiny(architecture)
    for item, scores in zip(BATCH, scoring.token_scores(model, BATCH, pad_id=0), strict=True):
        logp = torch.log_softmax(own_logits(model, item), -1)
        p, answer = logp.exp(), torch.tensor(item.answer)
        entropy = -(p * logp).sum(-1)
        want = logp.gather(1, answer[:, None])[:, 0]
        assert np.allclose(scores.logprobs, want, atol=2e-5)
        assert np.allclose(scores.entropies, entropy, atol=2e-5)
        assert np.allclose(scores.variances, (p * (logp + entropy[:, None]) ** 2).sum(-1), atol=2e-4)
        assert scores.hits.tolist() == (logp.argmax(-1) == answer).tolist()
        assert scores.loss == pytest.approx(float(-want.mean()), abs=2e-5) and scores.finite


def test_a_hit_is_a_hit():
    model = tiny()
    best = own_logits(model, Forced([1, 9, 12], [0]))[0].argmax().item()
    hit, miss = scoring.token_scores(model, [Forced([1, 9, 12], [best]), Forced([1, 9, 12], [best - 1])], 0)
    assert hit.hits.all() and not miss.hits.any()


@pytest.mark.parametrize("count_bytes", [2**26, 4 * 2 * 50])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "neox"])
def test_ranks_from_both_ends(architecture, count_bytes, monkeypatch):
    """Also in tiles smaller than the vocabulary and the rows."""
    monkeypatch.setattr(scoring, "COUNT_BYTES", count_bytes)
    model = tiny(architecture)
    for item, ranks in zip(BATCH, scoring.token_ranks(model, BATCH, pad_id=0), strict=True):
        logits = own_logits(model, item)
        own = logits.gather(1, torch.tensor(item.answer)[:, None])
        assert ranks.above.tolist() == (logits > own).sum(1).tolist()
        assert ranks.below.tolist() == (logits < own).sum(1).tolist()
        assert ranks.finite


def test_ties_and_padded_vocabularies_count_on_neither_side():
    from duet_kernels import LMHead

    head = LMHead(torch.tensor([[1.0], [2.0], [2.0], [3.0], [9.0]]), vocab_size=4)
    above, below, finite = scoring.count_ranks(torch.ones(2, 1), head, torch.tensor([1, 3]))
    assert above.tolist() == [1, 0] and below.tolist() == [1, 3] and finite.all()


def test_next_token_candidates_equal_scores_of_one_token():
    model = tiny()
    prompts, candidates = [[1, 9, 12], [1, 30]], [[20, 21, 22], [40, 41]]
    found = scoring.next_token_logprobs(model, prompts, candidates, pad_id=0)
    for prompt, ids, logprobs in zip(prompts, candidates, found, strict=True):
        want = torch.log_softmax(own_logits(model, Forced(prompt, [0])), -1)[0, ids]
        assert np.allclose(logprobs, want, atol=2e-5)


def test_nan_weights_are_seen():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[40] = torch.nan
    assert not any(scores.finite for scores in scoring.token_scores(model, BATCH, pad_id=0))
    assert not any(ranks.finite for ranks in scoring.token_ranks(model, BATCH, pad_id=0))
    said = continuations(model, word_tokenizer(), [[1, 9, 12], [1, 30]], max_new_tokens=3)
    assert not any(answer.finite for answer in said)


def test_batches_are_planned_from_lengths_alone():
    assert scoring.batches_by_length({0: 3, 1: 9, 2: 3, 3: 7}, 2) == [[1, 3], [0, 2]]
    assert scoring.batches_by_length({}, 2) == []


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "neox"])
def test_a_batch_says_what_each_row_says_alone(architecture):
    model, tokenizer = tiny(architecture), word_tokenizer()
    model.generation_config.repetition_penalty = 3.0  # a checkpoint's taste must not bend a greedy answer
    prompts = [[1, 9, 12, 14, 15, 16, 17], [1, 30], [1, 22, 23, 24]]
    together = continuations(model, tokenizer, prompts, max_new_tokens=8)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                ids.pop()
                break
        new = ids[len(prompt) :]
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer.num_tokens == len(new) and answer.finite


def test_the_room_of_an_answer_follows_from_its_own_prompt():
    """The context is 256: the first two prompts leave 6 and 7 new tokens, the last one 64 and more."""
    model, tokenizer = tiny(), word_tokenizer()
    model.generation_config.eos_token_id = None
    prompts = [[5] * 250, [6] * 249, [7] * 120]
    alone, together = (
        answers_to(model, tokenizer, prompts, max_new_tokens=64, batch_size=size, room=1) for size in (1, 3)
    )
    assert [said.num_tokens for said in together] == [6, 7, 64] and together == alone


def test_an_answer_of_as_many_tokens_as_are_allowed_was_cut():
    assert [Continuation("x", n, True, limit=3).cut for n in (2, 3)] == [False, True]
    assert not Continuation("x", 3, True, stopped=True, limit=3).cut


def test_stop_strings_end_an_answer_and_are_cut_off():
    tokenizer = merging_tokenizer()
    model = tiny(vocab_size=len(tokenizer))
    (whole,) = continuations(model, tokenizer, [[5, 6, 7]], max_new_tokens=12)
    stop = whole.text[3:5]
    (cut,) = continuations(model, tokenizer, [[5, 6, 7]], max_new_tokens=12, stop=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)].strip() and cut.num_tokens < whole.num_tokens
    assert cut_at("a b", ["c"]) == "a b" and cut_at("a b c", ["c", "b"]) == "a "
