"""What a server says of tokens, as columns of log-probabilities: the JSON of vLLM and of OpenAI's API, and the request for it.

    prompt_logprobs   [null, {"<id>": {"logprob": x, "rank": r, ...}, ...}, ...]   one entry a prompt token, how it is predicted
    logprobs          {"tokens": [...], "token_logprobs": [...], "top_logprobs": [{"token_id:<id>": x, ...}, ...]}
    logprobs (chat)   {"content": [{"token": "token_id:<id>", "logprob": x, "top_logprobs": [{"token": ..., "logprob": x}]}]}

The columns are TRL's (`columns`): `import_teacher` fills a store from a list of them, `TopK.from_logprobs` makes a target of one.
`ask_prompt` sends one text and returns its columns; `duet.store.build.ask_teacher` asks for all prompts of a run.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .columns import STYLES

_AS_ID = "token_id:"
_NOTHING = -9999.0  # vLLM writes it for a log-probability of -inf, which JSON has no number for


def ask_prompt(
    url: str,
    model: str,
    ids: Sequence[int],
    start: int = 1,
    *,
    k: int,
    temperature: float = 1.0,
    timeout: float = 60.0,
) -> dict[str, list]:
    """Asks vLLM how its model predicts the tokens of a text: one `POST url/v1/completions`, answered as `prompt_columns`.

    Args:
        url: of the server, such as `http://localhost:8000`.
        model: its name there.
        ids: token ids of the text; the server adds none.
        start: the first token that is scored, 1 to `len(ids) - 1`.
        k: how many ids a place; vLLM gives 20 at most unless it was started with a higher `--max-logprobs`.
        temperature: T of the log-probabilities. Another than 1 takes a server that was started with
            `--logprobs-mode processed_logprobs`; others do not divide by it, and nothing in the answer tells.
        timeout: seconds.

    Returns:
        As `prompt_columns`: place i tells how token `start + i` is predicted.

    Raises:
        ConnectionError: the server cannot be reached or refuses; with its reason.
        ValueError: an answer of another form, number of places, or text.
    """
    url = f"{url.rstrip('/')}/v1/completions"
    asked = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": 1,
        "prompt_logprobs": k,
        "temperature": temperature,
    }
    answer = _post(url, asked, timeout)
    try:
        said = answer["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        said = None
    if not isinstance(said, list):
        raise ValueError(
            f"url: wanted choices[0].prompt_logprobs from {url}, as vLLM answers, got {str(answer)[:200]}"
        )
    if len(said) != len(ids):
        raise ValueError(
            f"prompt_logprobs: wanted {len(ids)} places, one a token that was sent, got {len(said)}"
        )
    for i, token in enumerate(ids[start:], start):
        if said[i] and str(token) not in said[i]:
            raise ValueError(
                f"prompt_logprobs[{i}]: wanted the token {token} that was sent among its ids, got {', '.join(said[i])}; "
                "the server read another text"
            )
    return prompt_columns(said, start, k)


def _post(url: str, body: Mapping[str, Any], timeout: float) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            text = response.read()
    except urllib.error.HTTPError as error:
        reason = error.read(2000).decode(errors="replace")
        raise ConnectionError(f"url: {url} refused with status {error.code}: {reason}") from None
    except OSError as error:
        raise ConnectionError(
            f"url: {url} gave no answer ({error}); wanted a running server, such as `vllm serve`, or a longer timeout"
        ) from None
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"url: wanted JSON from {url}, got {text[:200]!r}") from None


def prompt_columns(
    prompt_logprobs: Sequence[Mapping[str, Any] | None], start: int = 1, k: int | None = None
) -> dict[str, list]:
    """The columns of a prompt's tokens from `start` on: place i tells how token `start + i` is predicted.

    The student's hidden state at token `start + i - 1` belongs to place i. To have a text judged, send it as a prompt.

    Args:
        prompt_logprobs: as in the response to a request with `prompt_logprobs=k`. The first token is predicted by nothing: null.
        start: the first token that is scored, at least 1.
        k: how many ids to keep, the most probable ones; None: all that were sent. A server adds the prompt's own token where
            it is not among its k best.

    Returns:
        `teacher_topk_ids` and `teacher_topk_logprobs`, `[positions, k]` lists filled up with -1 and -inf.

    Raises:
        ValueError: naming the place.

    Example:
        >>> said = [None, {"7": {"logprob": -0.5}, "3": {"logprob": -1.5}}, {"5": {"logprob": -0.1}}]
        >>> prompt_columns(said)
        {'teacher_topk_ids': [[7, 3], [5, -1]], 'teacher_topk_logprobs': [[-0.5, -1.5], [-0.1, -inf]]}
    """
    if not 1 <= start < len(prompt_logprobs):
        raise ValueError(f"start: wanted 1 to {len(prompt_logprobs) - 1}, the last token, got {start}")
    places = []
    for i, said in enumerate(prompt_logprobs[start:], start):
        if not said:
            raise ValueError(f"prompt_logprobs[{i}]: wanted log-probabilities by token id, got {said!r}")
        try:
            places.append(
                [(_id(token, f"prompt_logprobs[{i}]"), entry["logprob"]) for token, entry in said.items()]
            )
        except (KeyError, TypeError, AttributeError):
            raise ValueError(
                f'prompt_logprobs[{i}]: wanted {{"<id>": {{"logprob": number}}, ...}}, got {str(said)[:200]}'
            ) from None
    return _columns(places, k)


def completion_columns(logprobs: Mapping[str, Any], k: int | None = None) -> dict[str, list]:
    """The columns of the tokens that the server wrote, for a student that is to write the same.

    Args:
        logprobs: `choices[i]["logprobs"]` of the completions or the chat API, of a request with
            `return_tokens_as_token_ids=True` (vLLM): without it tokens are texts, which several ids may share.
        k: as in `prompt_columns`.

    Returns:
        As `prompt_columns`, one place a token that was written.

    Raises:
        ValueError: naming the place.

    Example:
        >>> said = {"tokens": ["token_id:3"], "token_logprobs": [-1.5], "top_logprobs": [{"token_id:7": -0.5}]}
        >>> completion_columns(said)
        {'teacher_topk_ids': [[7, 3]], 'teacher_topk_logprobs': [[-0.5, -1.5]]}
    """
    if logprobs.get("content") is not None:
        said = [
            [(one["token"], one["logprob"]) for one in (place, *place.get("top_logprobs", ()))]
            for place in logprobs["content"]
        ]
    else:
        own = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
        said = [[pair, *(top or {}).items()] for pair, top in zip(own, logprobs["top_logprobs"], strict=True)]
    return _columns([[(_id(t, f"logprobs[{i}]"), x) for t, x in place] for i, place in enumerate(said)], k)


def _id(token: str, where: str) -> int:
    text = str(token).removeprefix(_AS_ID)
    if not text.isdecimal():
        raise ValueError(
            f"{where}: wanted a token id, got {token!r}; send the request with return_tokens_as_token_ids=True"
        )
    return int(text)


def _columns(places: Sequence[Iterable[tuple[int, float]]], k: int | None) -> dict[str, list]:
    """Each id once, the most probable first, all places of one width."""
    kept = []
    for place in places:
        found = {i: x for i, x in place if x is not None and x > _NOTHING}
        kept.append(sorted(found.items(), key=lambda pair: -pair[1])[:k])
    width = max(map(len, kept), default=0)
    filled = [[*place, *[(-1, float("-inf"))] * (width - len(place))] for place in kept]
    names = STYLES["trl"]
    return {
        names.ids: [[i for i, _ in place] for place in filled],
        names.logprobs: [[x for _, x in place] for place in filled],
    }
