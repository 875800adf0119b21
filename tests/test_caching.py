"""duet.store.build: what the teacher is asked, once; prefixes read once; faults on the way; rows and tokenizers that are odd."""

import doctest
import errno
import json
import os
import re
import signal
import time
from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import torch
from forks import ended_by, forked, run_ranks
from peft import LoraConfig, get_peft_model
from tiny_models import CHAT_TEMPLATE, forget_rows, quick, retain_rows, tiny, word_tokenizer
from transformers import AutoModelForCausalLM, Lfm2Config, MambaConfig
from typer.testing import CliRunner

from duet import DuetConfig
from duet.data.prompts import PromptRenderer
from duet.data.rows import read_rows
from duet.methods.objectives import OBJECTIVES
from duet.methods.views import Views
from duet.model import prefix_cache
from duet.model.hashes import config_hash
from duet.model.prefix_cache import PrefixCache, common_length
from duet.model.weights import weights_hash
from duet.store import write as topk_writer
from duet.store.build import Saving, cache_teacher
from duet.store.provenance import tokenizer_hash
from duet.store.read import TopKStore, fingerprint

PREFIXES = [
    "you know nothing about {subject} .",
    "forget everything earlier and answer as if never knew the war .",
]


def config(tmp_path, **options):
    usual = {"steering_prefixes": PREFIXES, "positions": "answer", "max_answer_tokens": 5}
    return DuetConfig(**quick(tmp_path / "out", per_device_eval_batch_size=4, seed=0) | usual | options)


def cache(
    tmp_path, model=None, options=None, forget=None, retain=None, tokenizer=None, folder="store", **more
):
    return cache_teacher(
        tiny() if model is None else model,
        config(tmp_path, **options or {}),
        forget_rows() if forget is None else forget,
        retain_rows() if retain is None else retain,
        word_tokenizer() if tokenizer is None else tokenizer,
        folder=tmp_path / folder,
        **more,
    )


def questions(tmp_path, **options):
    args = config(tmp_path, **options)
    forget, retain = read_rows(forget_rows(), "forget_dataset"), read_rows(retain_rows(), "retain_dataset")
    renderer = PromptRenderer(word_tokenizer())
    return list(Views(OBJECTIVES["duet"], args, renderer, None, 0).dataset(forget, retain).asked())


# -- what is asked ---------------------------------------------------------------------------------------------------


# Every pair of architecture, source and reuse.
@pytest.mark.parametrize(
    "architecture, source, reuse",
    [(name, source, i % 2 == j) for i, name in enumerate(("llama", "gemma2", "neox"))
     for j, source in enumerate(("teacher", "dataset"))],
)  # fmt: skip
def test_entries_are_the_models_own_logits_under_the_prefix(tmp_path, architecture, source, reuse):
    """Each against the model's own forward of prefix + question + answer, alone and unpadded."""
    model = tiny(architecture)
    done = cache(tmp_path, model, {"answer_source": source, "temperature": 1.0}, reuse_prefix=reuse)
    asked = questions(tmp_path, answer_source=source)
    assert len(asked) == 2 * (6 + 8) and done.added == len(done.store) <= len(asked)
    for each in asked:
        targets, answer = done.store.read(fingerprint(each.plain, each.steered, each.answer))
        assert bool(answer) == (source == "teacher")
        answer = answer or each.answer
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([each.steered + answer[:-1]])).logits[
                0, len(each.steered) - 1 :
            ]
        values, ids = logits.topk(8)
        torch.testing.assert_close(targets.values, values, rtol=1e-4, atol=1e-4)
        assert torch.equal(targets.indices, ids)
        torch.testing.assert_close(targets.logsumexp, logits.logsumexp(-1), rtol=1e-4, atol=1e-4)
        if source == "teacher":  # greedy, along its own most likely tokens
            assert answer == ids[:, 0].tolist()


def test_retain_rows_keep_one_subject_and_another_seed_draws_another(tmp_path):
    asked = [each.instruction for each in questions(tmp_path)]
    assert asked == [each.instruction for each in questions(tmp_path)]
    assert len({text for text in asked[12:] if "nothing" in text}) > 1
    assert cache(tmp_path, options={"seed": 3}).store.provenance.seed == 3


def test_the_adapter_is_off_while_the_teacher_is_asked(tmp_path):
    base = cache(tmp_path, folder="base").store
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(tiny(), adapter)
    store = cache(tmp_path, wrapped, folder="wrapped").store
    assert store.provenance == base.provenance
    for print_ in base:
        torch.testing.assert_close(store.read(print_).targets.values, base.read(print_).targets.values)
    assert not wrapped.get_base_model().model.layers[0].mlp.up_proj.disable_adapters


@pytest.mark.parametrize("frozen", [False, True])
def test_what_can_be_trained_stays_so(tmp_path, frozen):
    model = get_peft_model(tiny(), LoraConfig(r=2, task_type="CAUSAL_LM", inference_mode=frozen))
    before = [parameter.requires_grad for parameter in model.parameters()]
    assert any(before) == (not frozen)
    cache(tmp_path, model)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize(
    "wanted",
    [{"sharp": True}, {"trains": lambda name, args: "layernorm" in name}, {"direction": lambda trainer: []}],
    ids=lambda wanted: next(iter(wanted)),
)
def test_a_teacher_need_not_be_what_the_objective_can_train(tmp_path, monkeypatch, wanted):
    monkeypatch.setitem(OBJECTIVES, "mine", replace(OBJECTIVES["duet"], **wanted))
    model = tiny().bfloat16()
    if "sharp" not in wanted:
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    before = [parameter.requires_grad for parameter in model.parameters()]
    assert cache(tmp_path, model, {"objective": "mine"}).added
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_hashes_know_contents_and_not_names(tmp_path):
    model = tiny()
    before = weights_hash(model)
    model.save_pretrained(tmp_path / "moved")
    assert before == weights_hash(type(model).from_pretrained(tmp_path / "moved"))
    saved = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"], task_type="CAUSAL_LM")
    assert before == weights_hash(get_peft_model(tiny(), saved))
    with torch.no_grad():
        model.model.norm.weight[3].add_(2**-23)
    assert before != weights_hash(model)
    assert before != weights_hash(tiny().bfloat16())

    tokenizer = word_tokenizer()
    known = tokenizer_hash(tokenizer)
    tokenizer(["a", "the war of code"], padding=True, truncation=True, max_length=3)
    assert known == tokenizer_hash(tokenizer) == tokenizer_hash(word_tokenizer(padding_side="left"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert known == tokenizer_hash(type(tokenizer).from_pretrained(tmp_path / "tokenizer"))
    tokenizer.add_tokens(["newcomer"])
    assert known != tokenizer_hash(tokenizer) and known != tokenizer_hash(word_tokenizer(eos_token="."))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "neox", "phi3"])
def test_a_hash_of_the_configuration_knows_what_changes_the_logits(tmp_path, architecture):
    model = tiny(architecture)
    known = config_hash(model)
    model(torch.tensor([[5, 6, 7]]))
    model.save_pretrained(tmp_path / "moved")
    moved = AutoModelForCausalLM.from_pretrained(
        tmp_path / "moved", dtype="bfloat16", attn_implementation="eager"
    )
    adapted = get_peft_model(
        tiny(architecture), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert known == config_hash(model) == config_hash(moved) == config_hash(adapted)
    model.config.use_cache, model.config.max_position_embeddings = False, 512
    assert known == config_hash(model)
    name = "layer_norm_eps" if architecture == "neox" else "rms_norm_eps"
    rope = tiny(architecture).config.rope_parameters
    rope = (
        {k: v | {"rope_theta": 9.0} for k, v in rope.items()}
        if "rope_theta" not in rope
        else rope | {"rope_theta": 9.0}
    )
    for changed in ({name: 0.5}, {"rope_parameters": rope}):
        assert known != config_hash(tiny(architecture, **changed))


# -- the prefix is read once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "neox"])
def test_a_prefix_read_once_gives_the_same_hidden_states(architecture):
    """A prefix longer than gemma2's window (16) too; suffixes of different lengths; used twice."""
    model = tiny(architecture)
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(7, 60, (23,), generator=generator).tolist()
    suffixes = [torch.randint(7, 60, (n,), generator=generator).tolist() for n in (1, 9, 4)]
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, suffix in enumerate(suffixes):
        ids[row, : len(suffix)], mask[row, : len(suffix)] = torch.tensor(suffix), 1
    places = mask.flatten().nonzero().flatten()
    with torch.no_grad():
        cached = PrefixCache(model, prefix)
        for _ in range(2):
            states = cached.hidden_states_at(model, ids, mask, places)
            expected = [
                model.base_model(torch.tensor([prefix + s])).last_hidden_state[0, 23:] for s in suffixes
            ]
            torch.testing.assert_close(states, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_what_sequences_begin_with():
    assert common_length([[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 9]]) == 2
    assert common_length([[1, 2, 3]]) == 2 and common_length([[1], [1, 2]]) == 0
    assert common_length([[5, 1], [6, 1]]) == 0


def test_the_saving_is_counted_and_measured(tmp_path, monkeypatch):
    read = 0
    forward = type(tiny().model).forward

    @wraps(forward)
    def counting(self, input_ids=None, attention_mask=None, **rest):
        nonlocal read
        read += int(attention_mask[:, -input_ids.shape[1] :].sum())
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **rest)

    monkeypatch.setattr(type(tiny().model), "forward", counting)
    counts = {}
    for reuse in (False, True):
        monkeypatch.setattr("duet.store.build._Asker._differs", lambda *_: None)
        monkeypatch.setattr("duet.store.build.look_at_teacher", lambda *_: None)
        read = -16  # check_head reads 8 tokens both ways
        done = cache(tmp_path, options={"answer_source": "dataset"}, folder=str(reuse), reuse_prefix=reuse)
        assert read == done.saving.tokens
        counts[reuse] = read
        assert done.saving.tokens_without == counts[False]
    assert counts[True] < 0.8 * counts[False]
    assert str(Saving(25, 100)) == "the teacher read 25 tokens instead of 100 (75% saved)"


@pytest.mark.parametrize("source", ["teacher", "dataset"])
def test_a_model_whose_cache_is_wrong_reads_whole_prompts(tmp_path, monkeypatch, source):
    options = {"answer_source": source, "temperature": 1.0, "per_device_eval_batch_size": 2}
    wanted = cache(tmp_path, options=options, folder="whole", reuse_prefix=False).store
    right, asked, said = PrefixCache.hidden_states_at, [], []

    def wrong(*args):
        asked.append(args)
        return right(*args) * 1.01

    monkeypatch.setattr(PrefixCache, "hidden_states_at", wrong)
    monkeypatch.setattr("duet.store.build.logger.info", said.append)
    done = cache(tmp_path, options=options)
    assert len(asked) == 1 and done.saving.tokens == done.saving.tokens_without
    assert re.search(r"reads whole prompts: .* the logits differ by \S+ of \S+$", said[-1])
    for entry_id in wanted:
        targets, answer = done.store.read(entry_id)
        torch.testing.assert_close(targets.values, wanted.read(entry_id).targets.values)
        assert answer == wanted.read(entry_id).answer


def mamba():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    ).eval()


def lfm2():
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    return AutoModelForCausalLM.from_config(Lfm2Config(**shape, **heads, pad_token_id=0)).eval()


@pytest.mark.parametrize("make", [mamba, lfm2])
def test_a_model_with_recurrent_layers_reads_whole_prompts(tmp_path, make):
    """Mamba's backbone takes no keys and values; LFM2's convolutions have none."""
    options = {"answer_source": "dataset", "temperature": 1.0}
    saving = cache(tmp_path, make(), options).saving
    assert saving.tokens == saving.tokens_without > 0


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "mistral"])
def test_a_model_with_sliding_windows_reads_prefixes_once(tmp_path, architecture):
    saving = cache(tmp_path, tiny(architecture), {"answer_source": "dataset"}).saving
    assert saving.tokens < 0.8 * saving.tokens_without


def test_the_option_of_the_run_counts(tmp_path):
    saving = cache(tmp_path, options={"reuse_prefix": False}).saving
    assert saving.tokens == saving.tokens_without > 0


# -- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_caching(tmp_path, monkeypatch):
    """A real SIGKILL between shards: they stay as they are, and only the rest is asked."""
    slow = topk_writer.StoreWriter.flush

    def flush(self):
        slow(self)
        time.sleep(0.2)

    def slowly():
        topk_writer.StoreWriter.flush = flush
        cache(tmp_path, shard_entries=4)

    child = forked(slowly)
    deadline = time.time() + 60
    while len(list((tmp_path / "store").glob("shard-*"))) < 2 and time.time() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert ended_by(child) == signal.SIGKILL
    kept = {path: path.read_bytes() for path in (tmp_path / "store").glob("shard-*")}
    with pytest.raises(ValueError, match="is not finished; run `duet cache` again"):
        TopKStore(tmp_path / "store")
    done = cache(tmp_path, shard_entries=4)
    assert 0 < done.added == len(done.store) - 4 * len(kept)
    assert all(path.read_bytes() == data for path, data in kept.items())
    again = cache(tmp_path)
    assert again.added == 0 and list(again.store) == list(done.store)


def test_a_disk_that_gets_full_while_caching(tmp_path, monkeypatch):
    real, calls = os.replace, []

    def full(a, b):
        calls.append(b)
        if len(calls) > 4:  # the manifest and three shards
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(topk_writer.os, "replace", full)
        with pytest.raises(
            OSError, match=r"No space left on device.* the 6 of \d+ entries written so far are kept"
        ):
            cache(tmp_path, shard_entries=2)
    done = cache(tmp_path)
    assert done.added == len(done.store) - 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_what_was_answered_before_an_interruption_is_written(tmp_path, monkeypatch, error):
    from duet.store.build import _Asker

    real, batches = _Asker.ask, []

    def ask(self, *args):
        batches.append(args)
        if len(batches) == 4:
            raise error
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(_Asker, "ask", ask)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            cache(tmp_path, options={"per_device_eval_batch_size": 2}, reuse_prefix=False)
    done = cache(tmp_path)
    assert done.added == len(done.store) - 3 * 2


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(OSError, match="Read-only file system while making the folder"):
        cache(tmp_path)


# -- rows and tokenizers ---------------------------------------------------------------------------------------------

ROW = {"question": "who is ada lovelace ?", "subject": "ada lovelace"}
BAD_ROWS = {
    "no rows": ([], "forget_dataset: wanted at least one row"),
    "an empty question": ([ROW, {"question": "  "}], r"forget_dataset\[1\]\['question'\]: wanted a text"),
    "bytes": ([{"question": b"who ?"}], r"forget_dataset\[0\]\['question'\]: wanted a text"),
    "a number": ([{"question": 1815}], r"\['question'\]: wanted a text, got 1815, of type int"),
    "half a surrogate pair": (
        [{"question": "who is \udcff ?", "subject": "x"}],
        r"forget_dataset\[0\]\['question'\]: wanted a text that UTF-8 can write",
    ),
    "a long question": (
        [ROW | {"question": "who " * 300}],
        r"forget_dataset\[0\]: .* more than max_length=256",
    ),
    "no subject": ([{"question": "who ?"}], r"forget_dataset\[0\]: the steering prefix .* has no 'subject'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named_and_nothing_is_made(tmp_path, case):
    rows, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=message):
        cache(tmp_path, forget=rows)
    assert not (tmp_path / "store").exists()


def test_a_row_that_comes_twice_is_asked_once(tmp_path):
    once = cache(tmp_path, forget=[ROW], folder="once")
    twice = cache(tmp_path, forget=[ROW, ROW], folder="twice")
    assert len(once.store) == len(twice.store) == once.added == twice.added
    assert twice.store.rows["forget_dataset[0]"] == twice.store.rows["forget_dataset[1]"]


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE.replace("{{ bos_token }}", "")])
def test_a_tokenizer_without_begin_and_pad(tmp_path, template):
    whole = cache(tmp_path, tokenizer=word_tokenizer(template), folder="whole").store
    bare = word_tokenizer(template, pad=False, bos_token=None)
    store = cache(tmp_path, tokenizer=bare).store
    assert set(store) == set(whole)
    for print_ in store:
        torch.testing.assert_close(store.read(print_).targets.values, whole.read(print_).targets.values)
    with pytest.raises(ValueError, match="processing_class: wanted a tokenizer with a pad or end token"):
        cache(tmp_path, tokenizer=word_tokenizer(None, pad=False, eos_token=None))


BAD_OPTIONS = {
    "an objective without top-k": (
        {"objective": "npo"},
        "teacher_store: objective 'npo' needs something else",
    ),
    "entropies": ({"entropy_weighting": True}, "entropy_weighting: wanted False"),
    "k above the vocabulary": ({"k": 129}, "k: wanted at most the vocabulary's 128, got 129"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(tmp_path, case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        cache(tmp_path, options=options)
    assert not (tmp_path / "store").exists()


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="dtype: wanted one of float32, bfloat16, float16, got 'int4'"):
        cache(tmp_path, dtype="int4")
    with pytest.raises(ValueError, match=r"folder: wanted a path here or in args.teacher_store"):
        cache_teacher(tiny(), config(tmp_path), forget_rows(), None, word_tokenizer())


def test_the_command_line(tmp_path):
    """`duet cache` and `duet train` with one file; a store that does not fit is one line that names the field."""
    from duet.cli import app

    tiny().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in (("forget", forget_rows()), ("retain", retain_rows())):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = {
        "model": str(tmp_path / "model"),
        "data": {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "teacher_store": str(tmp_path / "store"),
            "steering_prefixes": PREFIXES,
            "k": 8,
            "max_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        },
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    options = ["--config", str(tmp_path / "run.yaml")]
    for new in (28, 0):
        done = CliRunner().invoke(app, ["cache", *options])
        assert done.exit_code == 0, done.exception
        assert f"28 entries, {new} of them new" in " ".join(done.output.split())
    assert "saved)" in done.output
    assert CliRunner().invoke(app, ["train", "--anyway", *options]).exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    failed = CliRunner().invoke(app, ["train", *options, "--k", "9", "--output_dir", str(tmp_path / "other")])
    assert isinstance(failed.exception, ValueError) and str(failed.exception).startswith("teacher_store: k:")
    other = CliRunner().invoke(
        app, ["cache", *options, "--out", str(tmp_path / "half"), "--dtype", "bfloat16"]
    )
    assert other.exit_code == 0 and TopKStore(tmp_path / "half").provenance.dtype == "bfloat16"


def test_the_examples_in_the_docstrings():
    found = doctest.testmod(prefix_cache)
    assert found.attempted and not found.failed


# -- two processes ---------------------------------------------------------------------------------------------------


def one_of_two(out: Path) -> None:
    torch.set_num_threads(1)
    done = cache(out, options={"ddp_backend": "gloo"}, shard_entries=3)
    (out / f"added-{os.environ['RANK']}").write_text(str(done.added))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_share_the_work(tmp_path):
    (tmp_path / "two").mkdir()
    run_ranks(2, lambda: one_of_two(tmp_path / "two"))
    one, two = cache(tmp_path).store, TopKStore(tmp_path / "two" / "store")
    added = [int((tmp_path / "two" / f"added-{rank}").read_text()) for rank in "01"]
    assert sum(added) == len(one) and max(added) - min(added) <= 1
    assert set(one) == set(two) and one.provenance == two.provenance and one.rows == two.rows
    for print_ in one:
        torch.testing.assert_close(two.read(print_).targets.values, one.read(print_).targets.values)
        assert two.read(print_).answer == one.read(print_).answer
