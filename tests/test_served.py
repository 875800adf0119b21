"""What a server says becomes columns: responses written by hand after vLLM's format, aligned, padded, refused by name."""

import http.server
import json
import math
import socket
import threading
from functools import partial

import pytest
import torch
from test_topk_store import provenance
from tiny_models import forget_rows, quick, retain_rows, tiny, word_tokenizer

from duet import DuetConfig, DuetTrainer
from duet.store.build import ask_teacher
from duet.store.columns import read_columns
from duet.store.read import LOG_PROBABILITIES, MANIFEST
from duet.store.served import ask_prompt, completion_columns, prompt_columns
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
            lambda: prompt_columns([None, {"7": -0.5}]),
            r'prompt_logprobs\[1\]: wanted {"<id>": {"logprob": number}, ...}, got',
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


# --- a server -------------------------------------------------------------------------------------------------------


class Teacher(http.server.BaseHTTPRequestHandler):
    """Answers a completion request as vLLM does, with the log-probabilities of `server.model`; what else it does: `server.way`."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked))
        if self.server.way == "refuses":
            return self.answer(
                400, b'{"error": "Requested prompt logprobs of 8, which is greater than max allowed: 5"}'
            )
        if self.server.way == "is no vLLM":
            return self.answer(200, b'{"choices": [{"text": "x"}]}')
        if self.server.way == "is a page":
            return self.answer(200, b"<html>")
        ids = asked["prompt"]
        with torch.no_grad():
            logp = (self.server.model(torch.tensor([ids])).logits[0] / asked["temperature"]).log_softmax(-1)
        said = [None]
        for now, after in zip(logp[:-1], ids[1:], strict=True):
            best = now.topk(asked["prompt_logprobs"]).indices.tolist()
            said.append(
                {
                    str(i): {"logprob": now[i].item(), "rank": 1 + int((now > now[i]).sum())}
                    for i in (*best, after)
                }
            )
        if self.server.way == "adds a token":
            said.append(said[-1])
        if self.server.way == "reads another text":
            said[-1] = {"1": {"logprob": -0.5}}
        if self.server.way == "misses a place":
            said[-1] = None
        if self.server.way == "has other ids":
            said[-1]["99999"] = {"logprob": -0.01}
        return self.answer(200, json.dumps({"choices": [{"prompt_logprobs": said}]}).encode())

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Teacher) as it:
        it.url, it.model, it.way, it.asked = f"http://127.0.0.1:{it.server_port}/", tiny().eval(), "", []
        thread = threading.Thread(target=it.serve_forever, args=(0.01,))
        thread.start()
        yield it
        it.shutdown()
        thread.join()


def test_a_text_is_judged(server):
    ids = [5, 9, 30, 7]
    said = ask_prompt(server.url, "tiny", ids, 2, k=3, temperature=2.0)
    path, asked = server.asked[0]
    assert path == "/v1/completions"
    assert asked == {
        "model": "tiny",
        "prompt": ids,
        "max_tokens": 1,
        "prompt_logprobs": 3,
        "temperature": 2.0,
    }
    logp = (server.model(torch.tensor([ids])).logits[0, 1:-1] / 2).log_softmax(-1).topk(3)
    assert said["teacher_topk_ids"] == logp.indices.tolist()
    torch.testing.assert_close(torch.tensor(said["teacher_topk_logprobs"]), logp.values)


@pytest.mark.parametrize(
    "way, error, words",
    [
        ("refuses", ConnectionError, "status 400.*greater than max allowed: 5"),
        ("is no vLLM", ValueError, r"wanted choices\[0\].prompt_logprobs from .*, as vLLM answers"),
        ("is a page", ValueError, "wanted JSON from"),
        ("adds a token", ValueError, "wanted 4 places, one a token that was sent, got 5"),
        ("reads another text", ValueError, r"prompt_logprobs\[3\]: wanted the token 7 that was sent"),
        (
            "misses a place",
            ValueError,
            r"prompt_logprobs\[3\]: wanted log-probabilities by token id, got None",
        ),
    ],
)
def test_a_server_that_errs(server, way, error, words):
    server.way = way
    with pytest.raises(error, match=words):
        ask_prompt(server.url, "tiny", [5, 9, 30, 7], k=3)


def test_no_server():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectionError, match=r"gave no answer .*; wanted a running server"):
        ask_prompt(f"http://127.0.0.1:{port}", "tiny", [5, 9], k=3, timeout=5)


def config(tmp_path, **options):
    method = {"objective": "duet_forward_kl", "normalization": "tail", "retain_subjects": "fixed"}
    short = {"seed": 0, "max_steps": 2, "learning_rate": 3e-3, "max_answer_tokens": 5}
    return DuetConfig(**quick(tmp_path, **method, **short) | options)


@pytest.mark.parametrize(
    "options",
    [{"positions": "answer", "answer_source": "dataset"}, {"positions": "first", "temperature": 2.0}],
    ids=["answer", "first"],
)
def test_training_with_a_served_teacher(server, tmp_path, options):
    """Server -> store -> trainer: the losses are those of training with the live teacher."""
    args = config(tmp_path, **options)
    rows = forget_rows(3), retain_rows(3), word_tokenizer()
    ask = partial(ask_prompt, server.url, "tiny", k=8, temperature=args.temperature)
    store = ask_teacher(ask, tiny(), args, *rows, folder=tmp_path / "store")
    assert store.provenance.values == LOG_PROBABILITIES and len(server.asked) == len(store)
    losses = []
    for given in (store, None):
        trainer = DuetTrainer(tiny(), args, *rows[:2], processing_class=rows[2], teacher_store=given)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2


@pytest.mark.parametrize("asked, said", [({}, "1.0"), ({"temperature": 3.0}, "3.0")])
def test_a_server_that_would_be_asked_at_another_temperature(server, tmp_path, asked, said):
    ask = partial(ask_prompt, server.url, "tiny", k=8, **asked)
    wanted = rf"^ask: wanted ask_prompt with temperature=2.0, as in args.temperature, got {said}"
    with pytest.raises(ValueError, match=wanted):
        args = config(tmp_path, positions="first", temperature=2.0)
        ask_teacher(ask, tiny(), args, forget_rows(), None, word_tokenizer(), folder=tmp_path / "store")
    assert not (tmp_path / "store").exists() and not server.asked


def test_asking_goes_on_where_it_stopped(server, tmp_path):
    args, rows = config(tmp_path, positions="first"), (forget_rows(), retain_rows(), word_tokenizer())
    whole = ask_teacher(
        partial(ask_prompt, server.url, "tiny", k=8), tiny(), args, *rows, folder=tmp_path / "whole"
    )
    calls = []

    def ask(ids, start):
        calls.append(ids)
        server.way = "has other ids" if len(calls) == 3 else ""
        return ask_prompt(server.url, "tiny", ids, start, k=8)

    wanted = r"forget_dataset\[2\] under steering_prefixes\[0\]: columns\[0\]: wanted ids below 128"
    with pytest.raises(ValueError, match=wanted):
        ask_teacher(ask, tiny(), args, *rows, folder=tmp_path / "store")
    store = ask_teacher(ask, tiny(), args, *rows, folder=tmp_path / "store")
    assert len(calls) == len(store) + 1  # the one that failed is asked again
    for entry_id in whole:
        assert torch.equal(store.read(entry_id).targets.values, whole.read(entry_id).targets.values)
    (tmp_path / "store" / MANIFEST).unlink()
    with pytest.raises(ValueError, match="made for something else than the manifest beside it says"):
        ask_teacher(
            ask,
            tiny(),
            config(tmp_path, positions="first", temperature=2.0),
            *rows,
            folder=tmp_path / "store",
        )
    with pytest.raises(ValueError, match="answer_source: wanted 'dataset'"):
        ask_teacher(ask, tiny(), config(tmp_path, positions="answer"), *rows, folder=tmp_path / "no")
    with pytest.raises(ValueError, match=r"wanted 1 scored position\(s\) for forget_dataset\[0\], got 2"):
        ask_teacher(lambda ids, _: ask(ids, len(ids) - 2), tiny(), args, *rows, folder=tmp_path / "long")
    with pytest.raises(
        ValueError, match=r"forget_dataset\[0\] under steering_prefixes\[0\]: Expecting value"
    ):
        ask_teacher(lambda *_: json.loads("<html>"), tiny(), args, *rows, folder=tmp_path / "html")
