"""What a server says becomes columns: responses written by hand after vLLM's format, aligned, padded, refused by name."""

import json
import math

import pytest
import torch
from test_topk_store import provenance

from duet.store.columns import read_columns
from duet.store.served import completion_columns, prompt_columns
from duet_kernels import TopK, topk_distill_loss

# `prompt_logprobs=2` of the prompt [5, 7, 2, 9]: token 2 is not among the two best, so it was added, as the server does.
PROMPT = json.loads("""[
  null,
  {"7": {"logprob": -0.25, "rank": 1, "decoded_token": "a"}, "4": {"logprob": -2.0, "rank": 2, "decoded_token": "b"}},
  {"2": {"logprob": -6.5, "rank": 40, "decoded_token": "c"}, "8": {"logprob": -0.5, "rank": 1, "decoded_token": "d"},
   "1": {"logprob": -1.5, "rank": 2, "decoded_token": "e"}},
  {"9": {"logprob": 0.0, "rank": 1, "decoded_token": "f"}, "0": {"logprob": -9999.0, "rank": 2, "decoded_token": "g"}}
]""")
COMPLETION = json.loads("""{
  "text_offset": [0, 2], "tokens": ["token_id:2", "token_id:9"], "token_logprobs": [-6.5, 0.0],
  "top_logprobs": [{"token_id:2": -6.5, "token_id:8": -0.5, "token_id:1": -1.5}, {"token_id:9": 0.0}]
}""")
CHAT = json.loads("""{"content": [
  {"token": "token_id:2", "logprob": -6.5, "bytes": null, "top_logprobs": [
    {"token": "token_id:8", "logprob": -0.5, "bytes": null}, {"token": "token_id:1", "logprob": -1.5, "bytes": null}]},
  {"token": "token_id:9", "logprob": 0.0, "bytes": null, "top_logprobs": [
    {"token": "token_id:9", "logprob": 0.0, "bytes": null}, {"token": "token_id:0", "logprob": -9999.0, "bytes": null}]}
]}""")
INF = math.inf
WRITTEN = {
    "teacher_topk_ids": [[8, 1, 2], [9, -1, -1]],
    "teacher_topk_logprobs": [[-0.5, -1.5, -6.5], [0.0, -INF, -INF]],
}


def test_a_prompt():
    whole = prompt_columns(PROMPT)
    assert whole["teacher_topk_ids"] == [[7, 4, -1], *WRITTEN["teacher_topk_ids"]]
    assert whole["teacher_topk_logprobs"] == [[-0.25, -2.0, -INF], *WRITTEN["teacher_topk_logprobs"]]
    assert prompt_columns(PROMPT, start=2) == WRITTEN
    assert prompt_columns(PROMPT, k=1)["teacher_topk_ids"] == [[7], [8], [9]]


@pytest.mark.parametrize("said", [COMPLETION, CHAT], ids=["completions", "chat"])
def test_a_completion(said):
    assert completion_columns(said) == WRITTEN
    assert completion_columns(said, k=2)["teacher_topk_ids"] == [[8, 1], [9, -1]]


def test_the_columns_are_a_target():
    """The forward KL with a tail, by hand: -log q where the teacher is certain, all of its mass in a bucket elsewhere."""
    ids, logprobs = (torch.tensor(column) for column in prompt_columns(PROMPT, start=2).values())
    target = TopK.from_logprobs(ids, logprobs)
    weight = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(2, 4)
    options = {"divergence": "forward_kl", "normalization": "tail", "reduction": "none"}
    loss = topk_distill_loss(hidden, weight, target, **options)
    log_q = (hidden @ weight.T).log_softmax(-1)
    p = torch.tensor([-0.5, -1.5, -6.5]).exp()
    inside = log_q[0, [8, 1, 2]]
    rest = 1 - p.sum(), (1 - inside.exp().sum()).log()
    first = (p * (p.log() - inside)).sum() + rest[0] * (rest[0].log() - rest[1])
    torch.testing.assert_close(loss, torch.stack([first, -log_q[1, 9]]), rtol=1e-5, atol=1e-6)


def test_a_store_reads_the_columns():
    of_two = provenance(k=2, temperature=1.0, vocab_size=10)
    ((entry_id, entry),) = read_columns([prompt_columns(PROMPT)], of_two, [b"x"])
    assert entry_id == b"x" and entry.targets.indices.tolist() == [[7, 4], [8, 1], [9, 0]]
    values = torch.tensor([[-0.25, -2.0], [-0.5, -1.5], [0.0, -INF]])
    assert torch.equal(entry.targets.values, values)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: prompt_columns(PROMPT, start=0), "start: wanted 1 to 3"),
        (lambda: prompt_columns(PROMPT, start=4), "start: wanted 1 to 3"),
        (
            lambda: prompt_columns([None, None]),
            r"prompt_logprobs\[1\]: wanted log-probabilities by token id, got None",
        ),
        (
            lambda: completion_columns(
                {"tokens": [" the"], "token_logprobs": [-1.0], "top_logprobs": [None]}
            ),
            r"logprobs\[0\]: wanted a token id, got ' the'; send the request with return_tokens_as_token_ids=True",
        ),
    ],
)
def test_bad_responses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
