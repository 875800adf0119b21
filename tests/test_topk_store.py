"""duet.store: read, write, columns: what is written is read; kills, full disks, damage and forgery are met."""

import dataclasses
import doctest
import errno
import json
import os
import pickle
import resource
import shutil

import pytest
import torch
from forks import ended_by, forked
from safetensors.torch import load_file, save_file

from duet import folders
from duet.model.hashes import json_hash
from duet.store import read as topk_store
from duet.store import write as topk_writer
from duet.store.columns import read_columns, write_columns
from duet.store.read import (
    LOG_PROBABILITIES,
    MANIFEST,
    MAY_LACK,
    Entry,
    Provenance,
    TopKStore,
    fingerprint,
    truncated,
)
from duet.store.write import StoreWriter
from duet_kernels import LMHead, TopK, linear_topk

V, D, K = 203, 24, 7
PRINTS = [fingerprint([i], [i, i]) for i in range(6)]
ROWS = {f"forget_dataset[{i}]": [PRINTS[2 * i], PRINTS[2 * i + 1]] for i in range(3)}


def provenance(**changes):
    defaults = {
        "model": "a/model",
        "architecture": "LlamaForCausalLM",
        "model_dtype": "float32",
        "weights": "w",
        "tokenizer": "t",
        "chat_template": "c",
        "chat_template_kwargs": {},
        "plain_template": "{question}",
        "prefixes": ["forget {subject}", "never mind {subject}"],
        "seed": 0,
        "positions": "answer",
        "max_scored": 4,
        "answers": "teacher",
        "k": K,
        "temperature": 1.5,
        "vocab_size": V,
        "softcap": None,
        "scale": 1.0,
        "config": "o",
        "autocast": "none",
    }
    return Provenance(**defaults | changes)


def entry(i, k=K, temperature=1.5, vocabulary=V):
    generator = torch.Generator().manual_seed(i)
    positions = 1 + i % 4
    hidden = torch.randn(positions, D, generator=generator)
    head = LMHead(torch.randn(vocabulary, D, generator=generator))
    return Entry(linear_topk(hidden, head, k, temperature=temperature), list(range(i, i + positions)))


def fill(folder, prints=PRINTS, shard_entries=2, finish=True, **changes):
    made = provenance(**changes)
    writer = StoreWriter(folder, made, ROWS, shard_entries)
    writer.begin()
    for print_ in writer.scan():
        if print_ in prints:
            item = entry(PRINTS.index(print_), made.k, made.temperature, made.vocab_size)
            writer.add(print_, item)
    writer.flush()
    if finish:
        writer.finish()
    return writer


def assert_same(a: TopK, b: TopK):
    for one, two in zip(a[:3], b[:3], strict=True):
        assert torch.equal(one, two)
    assert a.temperature == b.temperature


def shards(folder):
    return sorted(folder.glob("shard-*"))


# -- writing and reading ---------------------------------------------------------------------------------------------


def test_what_is_written_is_read_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill("~/store")
    store = TopKStore("~/store")
    assert set(store) == set(PRINTS) and len(store) == 6 and store.provenance == provenance()
    assert len(shards(tmp_path / "store")) == 3
    for i, print_ in enumerate(PRINTS):
        read = store.read(print_)
        assert_same(read.targets, entry(i).targets)
        assert read.answer == entry(i).answer
        assert read.targets.values.dtype == torch.float32 and read.targets.indices.dtype == torch.int64
    assert fingerprint([9]) not in store
    with pytest.raises(KeyError):
        store.read(fingerprint([9]))


@pytest.mark.parametrize(("dtype", "eps"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_rounds_values_and_nothing_else(tmp_path, dtype, eps):
    fill(tmp_path / "store", dtype=dtype)
    read, truth = TopKStore(tmp_path / "store").read(PRINTS[3]).targets, entry(3).targets
    assert torch.equal(read.values, truth.values.to(getattr(torch, dtype)).float())
    assert ((read.values - truth.values).abs() <= eps * truth.values.abs()).all()
    assert torch.equal(read.tail_logsumexp, truth.tail_logsumexp) and torch.equal(read.indices, truth.indices)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(256, torch.uint8), (257, torch.uint16), (65536, torch.uint16), (65537, torch.int32)],
)
def test_ids_take_the_smallest_integer_that_fits(tmp_path, vocabulary, dtype):
    writer = StoreWriter(tmp_path / "store", provenance(vocab_size=vocabulary, k=2), {"row": PRINTS[:1]})
    writer.begin()
    largest = TopK(
        torch.tensor([[2.0, 1.0]]), torch.tensor([[vocabulary - 1, 0]]), torch.tensor([0.5]), temperature=1.5
    )
    writer.add(PRINTS[0], Entry(largest, []))
    writer.flush()
    writer.finish()
    assert load_file(shards(tmp_path / "store")[0])["indices"].dtype == dtype
    assert_same(TopKStore(tmp_path / "store").read(PRINTS[0]).targets, largest)


def test_fewer_logits_are_exactly_those_of_a_smaller_k(tmp_path):
    fill(tmp_path / "store")
    for k in (1, 3, K):
        read = TopKStore(tmp_path / "store").read(PRINTS[2], k).targets
        truth = entry(2, k).targets
        assert torch.equal(read.values, truth.values) and torch.equal(read.indices, truth.indices)
        torch.testing.assert_close(read.tail_logsumexp, truth.tail_logsumexp, rtol=1e-6, atol=1e-6)
    absent = TopK(torch.tensor([[1.0, -torch.inf]]), torch.tensor([[3, 0]]), torch.tensor([-torch.inf]))
    assert truncated(absent, 1).tail_logsumexp.tolist() == [-torch.inf]


def test_shards_are_mapped_and_not_loaded(tmp_path):
    """64 MB are opened for a few MB of memory; a copy for another process carries no tensors."""
    positions = 400_000
    writer = StoreWriter(tmp_path / "store", provenance(k=32), {"row": PRINTS[:1]})
    writer.begin()
    wide = TopK(
        torch.zeros(positions, 32), torch.zeros(positions, 32, dtype=torch.int64), torch.zeros(positions), 1.5
    )
    writer.add(PRINTS[0], Entry(wide, []))  # 4 + 1 bytes a slot
    writer.finish()
    del wide

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc")
    before = resident()
    store = TopKStore(tmp_path / "store", verify=False)
    assert len(store) == 1
    assert resident() - before < 16e6 < shards(tmp_path / "store")[0].stat().st_size
    assert len(pickle.dumps(store)) < 10_000


def test_a_fingerprint_tells_every_split_apart():
    sequences = [([1, 2], [3]), ([1], [2, 3]), ([1, 2, 3], []), ([], [1, 2, 3]), ([1, 2, 3],), ([3, 2, 1],)]
    assert len({fingerprint(*each) for each in sequences}) == len(sequences)


# -- kills and disks -------------------------------------------------------------------------------------------------


class Dies:
    """Counts what reaches the disk, in steps (bytes written, synced, renamed), and ends the process at one of them."""

    def __init__(self, at: int, bytes_a_step: int = 701):
        self.at, self.size, self.steps = at, bytes_a_step, 0

    def step(self):
        self.steps += 1
        if self.steps == self.at:
            os._exit(9)  # no handler, no flush: as SIGKILL

    def install(self, monkeypatch):
        real_fsync, real_replace = os.fsync, os.replace
        dies = self

        class File:
            def __init__(self, path, mode):
                self.file = open(path, mode, buffering=0)  # noqa: SIM115

            def write(self, data):
                for start in range(0, len(data), dies.size):
                    self.file.write(data[start : start + dies.size])
                    dies.step()

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def flush(self):
                pass

            def fileno(self):
                return self.file.fileno()

        def fsync(handle):
            dies.step()
            real_fsync(handle)

        def replace(a, b):
            dies.step()
            real_replace(a, b)
            dies.step()

        monkeypatch.setattr(folders, "open", File, raising=False)
        monkeypatch.setattr(topk_writer.os, "fsync", fsync)
        monkeypatch.setattr(topk_writer.os, "replace", replace)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_nothing_that_was_finished_is_lost(tmp_path, monkeypatch):
    """One kill after every step of the disk; then the next run keeps what is whole and finishes."""
    whole = tmp_path / "whole"
    fill(whole)
    died = 0
    for at in range(1, 200):
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            Dies(at).install(patch)
            status = ended_by(forked(lambda folder=folder: fill(folder)))
        if status == 0:
            break
        assert os.waitstatus_to_exitcode(status) == 9
        died += 1
        kept = shards(folder) if folder.exists() else []
        assert all((whole / path.name).read_bytes() == path.read_bytes() for path in kept)
        if not (folder / MANIFEST).exists() or not json.loads((folder / MANIFEST).read_bytes())["complete"]:
            with pytest.raises((ValueError, FileNotFoundError), match="teacher_store"):
                TopKStore(folder)
        asked = []
        monkeypatch.setattr(
            StoreWriter,
            "add",
            lambda self, p, e, add=StoreWriter.add, asked=asked: (asked.append(p), add(self, p, e)),
        )
        fill(folder)
        monkeypatch.undo()
        assert len(asked) == 6 - 2 * len(kept)
        assert len(TopKStore(folder)) == 6 and not list(folder.glob(".*.tmp"))
        assert [path.name for path in shards(folder)] == [path.name for path in shards(whole)]
        shutil.rmtree(folder)
    assert died > 20 and status == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_a_disk_that_fails(tmp_path, monkeypatch, code, where):
    """The error says what is kept; no temporary file stays; the same command goes on."""
    fill(tmp_path / "store", PRINTS[:2], finish=False)

    def fails(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(
            *((folders, "open") if where == "open" else (topk_writer.os, where)), fails, raising=False
        )
        with pytest.raises(OSError, match="the 2 of 6 entries written so far are kept") as caught:
            fill(tmp_path / "store")
    assert caught.value.errno == code and os.strerror(code) in str(caught.value)
    assert len(shards(tmp_path / "store")) == 1 and not list((tmp_path / "store").glob(".*"))
    fill(tmp_path / "store")
    assert len(TopKStore(tmp_path / "store")) == 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_write_that_the_system_cuts_short(tmp_path):
    """A real one: a file may not grow over a limit, so that a shard fails in the middle."""
    report = tmp_path / "error"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        try:
            fill(tmp_path / "store", PRINTS[:1], shard_entries=1, finish=False, k=200)
            fill(tmp_path / "store", shard_entries=6, k=200)
        except OSError as error:
            report.write_text(f"{error.errno} {error}")

    assert ended_by(forked(limited)) == 0
    assert report.read_text().startswith(f"{errno.EFBIG} ") and "the 1 of 6 entries" in report.read_text()
    assert len(shards(tmp_path / "store")) == 1 and not list((tmp_path / "store").glob(".*"))
    fill(tmp_path / "store", k=200)
    assert len(TopKStore(tmp_path / "store")) == 6


def test_reading_changes_nothing_and_needs_no_right_to_write(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    fill(folder)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    folder.chmod(0o500)

    def refused(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    try:
        monkeypatch.setattr(topk_writer, "write_atomically", refused)
        assert len(TopKStore(folder)) == 6
        fill(folder)  # finished: nothing to do, nothing written
    finally:
        folder.chmod(0o700)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_values_that_do_not_fit_are_refused(tmp_path):
    writer = StoreWriter(tmp_path / "store", provenance(dtype="float16"), ROWS)
    big = entry(0).targets
    with pytest.raises(ValueError, match=r"dtype: a teacher's logit of .* does not fit float16"):
        writer.add(PRINTS[0], Entry(big._replace(values=big.values * 1e5), []))
    with pytest.raises(ValueError, match="NaN"):
        writer.add(PRINTS[0], Entry(big._replace(values=big.values * torch.nan), []))
    with pytest.raises(ValueError, match="dtype: wanted one of float32, bfloat16, float16, got 'int8'"):
        provenance(dtype="int8")


def test_a_store_that_is_not_finished(tmp_path):
    writer = fill(tmp_path / "store", PRINTS[:3], finish=False)
    with pytest.raises(ValueError, match="is not finished; run `duet cache` again"):
        TopKStore(tmp_path / "store")
    with pytest.raises(RuntimeError, match="3 of 6 entries were not written"):
        writer.finish()


# -- made for something else ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(Provenance) if field.name != "model"]
)
def test_another_provenance_is_refused_by_the_name_of_its_field(tmp_path, field):
    fill(tmp_path / "store", PRINTS[:2], finish=False)
    changed = {
        int: 3,
        float: 9.5,
        str: {"dtype": "float16", "values": LOG_PROBABILITIES}.get(field, "another"),
        type(None): 2.5,
        list: ["another"],
        dict: {"enable_thinking": True},
    }[type(getattr(provenance(), field))]
    with pytest.raises(
        ValueError, match=rf"^teacher_store: {field}: the store was made with .*, this run has"
    ):
        StoreWriter(tmp_path / "store", provenance(**{field: changed}), ROWS).begin()
    StoreWriter(tmp_path / "store", provenance(model="moved/elsewhere"), ROWS).begin()


def test_what_is_no_json_has_no_seal():
    with pytest.raises(TypeError, match="not JSON serializable"):
        _ = provenance(chat_template_kwargs={"day": object()}).seal


def test_a_store_of_an_earlier_version_is_gone_on_with(tmp_path):
    """Its manifest and the seals of its shards lack a field that nobody compared then."""
    folder, lacking = tmp_path / "store", dict.fromkeys(MAY_LACK)
    fill(folder, PRINTS[:2], finish=False, **lacking)
    forge(folder, lambda body: [body["provenance"].pop(name) for name in MAY_LACK])
    body = json.loads((folder / MANIFEST).read_text())["provenance"]
    assert provenance(**lacking).seal == json_hash(body | {"model": ""})
    writer = fill(folder)
    assert len(writer.written) == 6 and TopKStore(folder).provenance == provenance(**lacking)


def test_other_rows_are_refused_by_name(tmp_path):
    fill(tmp_path / "store", PRINTS[:2], finish=False)
    for rows in (ROWS | {"forget_dataset[1]": PRINTS[:2]}, ROWS | {"forget_dataset[3]": PRINTS[:2]}):
        with pytest.raises(
            ValueError, match=r"teacher_store: rows: forget_dataset\[[13]\] is not what it was"
        ):
            StoreWriter(tmp_path / "store", provenance(), rows).begin()


def test_shards_of_another_store_do_not_slip_in(tmp_path):
    """Their names and checksums are right, and the manifest that could tell was deleted."""
    fill(tmp_path / "store")
    (tmp_path / "store" / MANIFEST).unlink()
    with pytest.raises(ValueError, match="was made for something else than the manifest"):
        fill(tmp_path / "store", weights="another")


def test_a_folder_with_something_else_in_it(tmp_path):
    (tmp_path / "thesis.tex").write_text("a year's work")
    with pytest.raises(FileExistsError, match="neither empty nor a store"):
        fill(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"teacher_store: .* is a file, wanted a folder"):
        fill(tmp_path / "file")


def test_only_what_killed_writers_left_is_cleared_up_and_only_in_a_store(tmp_path):
    ours = [f".{name}.{'0' * 32}.tmp" for name in (MANIFEST, f"shard-{'0' * 32}.safetensors")]
    folders = tmp_path / "thesis", tmp_path / "store", tmp_path / "new"
    fill(folders[1])
    for folder in folders:
        folder.mkdir(exist_ok=True)
        for name in (".notes.tmp", *ours):
            (folder / name).touch()
    (folders[0] / "thesis.tex").touch()
    with pytest.raises(FileExistsError):
        fill(folders[0])
    with pytest.raises(ValueError, match="weights"):
        fill(folders[1], weights="another")
    assert all((folder / name).exists() for folder in folders[:2] for name in ours)
    for folder in folders[1:]:
        fill(folder)
        assert [path.name for path in folder.glob(".*")] == [".notes.tmp"]


# -- damage and forgery ----------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_detected_and_named(tmp_path):
    folder = tmp_path / "store"
    fill(folder, shard_entries=6)
    for path in folder.iterdir():
        good = path.read_bytes()
        for place in range(0, len(good), 5 if path.name == MANIFEST else 97):
            path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
            with pytest.raises(ValueError, match=rf"teacher_store: .*{path.name}"):
                TopKStore(folder)
        for cut in (0, 1, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:cut])
            with pytest.raises(ValueError, match=rf"teacher_store: .*{path.name}"):
                TopKStore(folder)
        path.write_bytes(good)
    TopKStore(folder)


def test_a_damaged_shard_is_made_anew_and_the_rest_is_kept(tmp_path):
    folder = tmp_path / "store"
    fill(folder)
    bad = shards(folder)[1]
    good = bad.read_bytes()
    bad.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    kept = {path: path.stat().st_mtime_ns for path in shards(folder) if path != bad}
    fill(folder)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert bad.read_bytes() == good and len(TopKStore(folder)) == 6
    bad.unlink()
    with pytest.raises(FileNotFoundError, match="a shard is missing; run `duet cache` again"):
        TopKStore(folder)


def forge(folder, change):
    """A manifest with a valid checksum over a changed body."""
    body = json.loads((folder / MANIFEST).read_bytes())
    del body["checksum"]
    change(body)
    (folder / MANIFEST).write_text(json.dumps(body | {"checksum": json_hash(body)}))


@pytest.mark.parametrize(
    "name",
    [
        "../shard-" + "0" * 32 + ".safetensors",
        "/etc/passwd",
        "a/../../x",
        "shard-x.safetensors",
        "",
        None,
        3,
        ["a"],
    ],
)
def test_a_manifest_cannot_point_outside_its_folder(tmp_path, name):
    fill(tmp_path / "store")
    forge(tmp_path / "store", lambda body: body["shards"][0].update(file=name))
    with pytest.raises(ValueError, match="wanted a shard in its own folder"):
        TopKStore(tmp_path / "store")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("rows"),
        lambda body: body.pop("complete"),
        lambda body: body["provenance"].pop("k"),
        lambda body: body["provenance"].update(extra=1),
        lambda body: body.update(provenance=None),
        lambda body: body.update(shards=None),
        lambda body: body.update(rows=[1]),
        lambda body: body["rows"].update(more=["not hexadecimal"]),
        lambda body: body["rows"].update(more=["00" * 16]),
        lambda body: body["provenance"].update(dtype="int8"),
        lambda body: body["provenance"].update(vocab_size=5),
        lambda body: body.update(format="duet-topk-store/99"),
    ],
)
def test_a_corrupt_manifest(tmp_path, change):
    fill(tmp_path / "store")
    forge(tmp_path / "store", change)
    with pytest.raises(ValueError, match="teacher_store"):
        TopKStore(tmp_path / "store")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_none(tmp_path, content):
    fill(tmp_path / "store")
    (tmp_path / "store" / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=rf"teacher_store: .*{MANIFEST}"):
        TopKStore(tmp_path / "store")


def test_no_store_at_all(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="wanted a folder written by `duet cache`"):
            TopKStore(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": torch.tensor([0, 5, 3, 9, 9, 9, 15])},
        {"offsets": torch.tensor([0, 1])},
        {"indices": torch.full((15, K), V, dtype=torch.uint8)},
        {"tail_logsumexp": torch.zeros(2)},
        {"values": torch.zeros(15, K, dtype=torch.float64)},
        {"values": None},
        {"fingerprints": torch.zeros(6, 3, dtype=torch.uint8)},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_forged_shard(tmp_path, change):
    """Named by its own hash, named by the manifest, and still not what a shard is."""
    folder = tmp_path / "store"
    fill(folder, shard_entries=6)
    (path,) = shards(folder)
    tensors = {name: value for name, value in (load_file(path) | change).items() if value is not None}
    path.unlink()
    save_file(tensors, folder / "new", metadata={"provenance": provenance().seal})
    name = f"shard-{topk_writer.hashlib.blake2b((folder / 'new').read_bytes(), digest_size=16).hexdigest()}.safetensors"
    (folder / "new").rename(folder / name)
    forge(folder, lambda body: body["shards"][0].update(file=name))
    with pytest.raises(ValueError, match=rf"{name}: its tensors are not what the manifest says"):
        TopKStore(folder)


# -- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["axolotl", "trl"])
@pytest.mark.parametrize("prompts", [False, True])
def test_columns_are_the_log_probabilities_and_come_back(tmp_path, style, prompts):
    fill(tmp_path / "store")
    store = TopKStore(tmp_path / "store")
    before = {print_: [1, 2, 3][: i % 3] for i, print_ in enumerate(PRINTS)} if prompts else None
    columns = write_columns(store, style, before)
    ids, logprobs = columns.column_names[-3:-1] if style == "axolotl" else columns.column_names[-2:]
    assert (ids, logprobs) == {
        "axolotl": ("target_token_ids", "target_logprobs"),
        "trl": ("teacher_topk_ids", "teacher_topk_logprobs"),
    }[style]
    assert all(len(row[ids]) == len(row.get("input_ids", row[ids])) for row in columns)

    read = dict(read_columns(columns, dataclasses.replace(provenance(), values=LOG_PROBABILITIES), []))
    assert list(read) == list(store)
    for print_ in PRINTS:
        truth, back = store.read(print_), read[print_]
        assert torch.equal(back.targets.indices, truth.targets.indices) and back.answer == truth.answer
        shift = (truth.targets.values - back.targets.values) / 1.5
        torch.testing.assert_close(
            shift, truth.targets.logsumexp.unsqueeze(-1).expand_as(shift), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            back.targets.tail_logsumexp,
            truth.targets.tail_logsumexp - truth.targets.logsumexp,
            rtol=1e-4,
            atol=1e-4,
        )
        torch.testing.assert_close(
            back.targets.logsumexp, torch.zeros_like(back.targets.logsumexp), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("style", ["axolotl", "trl"])
def test_columns_of_prompts_take_the_answers_of_the_store(tmp_path, style):
    """Where the answers are the dataset's, the store has positions and no tokens for them."""
    writer = StoreWriter(tmp_path / "store", provenance(answers="dataset"), {"row": PRINTS[:1]})
    writer.begin()
    writer.add(PRINTS[0], entry(2)._replace(answer=[]))
    writer.flush()
    writer.finish()
    store = TopKStore(tmp_path / "store")
    with pytest.raises(
        ValueError, match=rf"prompts: entry {PRINTS[0].hex()} has \d scored .* and 0 answer ids"
    ):
        write_columns(store, style, {PRINTS[0]: [1, 2]})
    assert len(write_columns(store, style)) == 1


def test_columns_of_others_may_be_ragged_unsorted_and_repeat_an_id():
    row = {
        "teacher_topk_ids": [[-1, -1, -1], [7, 3, 7], [4, -1, -1]],
        "teacher_topk_logprobs": [[-9.0, -9.0, -9.0], [-2.0, -1.0, -2.5], [-0.0, -1.0, -torch.inf]],
    }
    ((print_, read),) = read_columns([row], provenance(k=2, temperature=1.0), PRINTS[:1])
    assert print_ == PRINTS[0]
    assert read.targets.indices.tolist() == [[3, 7], [4, 0]]
    assert read.targets.values.tolist() == [[-1.0, -2.0], [0.0, -torch.inf]]
    rest = torch.tensor(1 - torch.e**-1 - torch.e**-2).log()
    torch.testing.assert_close(read.targets.tail_logsumexp, torch.tensor([rest, -torch.inf]))


def read_one(ids, probabilities, k=2):
    row = {"teacher_topk_ids": [ids], "teacher_topk_logprobs": [torch.tensor(probabilities).log().tolist()]}
    ((_, read),) = read_columns([row], provenance(k=k, temperature=1.0), PRINTS[:1])
    return read.targets


def test_columns_of_equal_values_keep_their_order():
    """Where values were rounded, the order alone tells which were the k largest."""
    assert read_one([9, 4, 6], [0.3, 0.3, 0.3]).indices.tolist() == [[9, 4]]


def test_columns_that_repeat_an_id_mean_the_largest():
    """Padding is often id 0 with a very low value."""
    read = read_one([0, 0, 7], [1e-30, 0.6, 0.3])
    assert read.indices.tolist() == [[0, 7]]
    torch.testing.assert_close(read.values.exp(), torch.tensor([[0.6, 0.3]]))
    torch.testing.assert_close(read.tail_logsumexp.exp(), torch.tensor([0.1]))


def test_columns_may_sum_to_a_thousandth_more_than_1():
    assert read_one([1, 2], [0.5005, 0.5]).tail_logsumexp.item() == -torch.inf
    with pytest.raises(
        ValueError,
        match=r"^columns\[0\]: wanted log-probabilities in 'teacher_topk_logprobs', .* sum to 1\.005$",
    ):
        read_one([1, 2], [0.505, 0.5])


GOOD = {
    "teacher_topk_ids": [[1]],
    "teacher_topk_logprobs": [[-1.0]],
    "fingerprint": PRINTS[0].hex(),
    "answer_ids": [1],
}
BAD_COLUMNS = {
    "one mapping": (GOOD, "columns: wanted a datasets.Dataset or a list of rows"),
    "a fingerprint of other letters": (
        [GOOD, GOOD | {"fingerprint": "zz"}],
        r"columns\[1\]: wanted hexadecimal digits in 'fingerprint', got 'zz'",
    ),
    "no fingerprint": ([GOOD | {"fingerprint": None}], r"columns\[0\]: wanted hexadecimal digits .* None"),
    **{
        f"a row without {name}": (
            [GOOD, {k: v for k, v in GOOD.items() if k != name}],
            rf"columns\[1\]: wanted '{name}', as in columns\[0\]",
        )
        for name in list(GOOD)[:3]
    },
    "an answer of texts": ([GOOD | {"answer_ids": ["a"]}], r"columns\[0\]: wanted token ids in 'answer_ids'"),
    "an answer that is a number": ([GOOD | {"answer_ids": 3}], r"columns\[0\]: wanted token ids in"),
    "an answer id outside": ([GOOD | {"answer_ids": [V]}], rf"columns\[0\]: wanted ids below {V} in 'answ"),
    "an answer id below 0": ([GOOD | {"answer_ids": [-1]}], rf"columns\[0\]: wanted ids below {V} in 'answ"),
    "a long answer": (
        [GOOD | {"answer_ids": [1] * 5}],
        r"columns\[0\]: wanted at most 4 ids in 'answer_ids'",
    ),
    "an id of 65 bits": ([GOOD | {"teacher_topk_ids": [[2**65]]}], r"columns\[0\]: wanted \[positions, k\]"),
    "no columns": ([{"text": "x"}], "wanted 'target_token_ids' and 'target_logprobs' or"),
    "no rows": ([], "at least one row"),
    "another number of rows": (
        [{"teacher_topk_ids": [[1]], "teacher_topk_logprobs": [[-1.0]]}] * 2,
        "wanted 1 rows",
    ),
    "another shape": ([{"teacher_topk_ids": [[1, 2]], "teacher_topk_logprobs": [[-1.0]]}], "of one shape"),
    "texts": ([{"teacher_topk_ids": [["a"]], "teacher_topk_logprobs": [[-1.0]]}], r"columns\[0\]"),
    "logits": ([{"teacher_topk_ids": [[1]], "teacher_topk_logprobs": [[9.0]]}], "wanted log-probabilities"),
    "a NaN": ([{"teacher_topk_ids": [[1]], "teacher_topk_logprobs": [[torch.nan]]}], "no NaN"),
    "an id outside": ([{"teacher_topk_ids": [[V]], "teacher_topk_logprobs": [[-1.0]]}], f"ids below {V}"),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_bad_columns(case):
    columns, message = BAD_COLUMNS[case]
    with pytest.raises((TypeError, ValueError), match=message):
        list(read_columns(columns, provenance(), PRINTS[:1]))


def test_the_examples_in_the_docstrings(tmp_path):
    fill(tmp_path / "store")
    found = doctest.testmod(topk_store, extraglobs={"store_folder": tmp_path / "store"})
    assert found.attempted >= 5 and not found.failed
