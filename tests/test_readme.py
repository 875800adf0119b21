"""README.md and docs/ say what the results say. That what they show runs is `test_docs`."""

import json
import re

import pytest

from benchmarks import readme

each_page = pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.stem)


@each_page
def test_numbers_are_those_of_the_results(page):
    text = page.read_text()
    assert readme.filled(page, text) == text


@pytest.mark.parametrize("name", readme.BLOCKS)
def test_a_changed_number_is_noticed(name):
    page = next(page for page, names in readme.PAGES.items() if name in names)
    text = page.read_text()
    begin = text.index(f"<!-- {name}:begin -->")
    block = text[begin : text.index(f"<!-- {name}:end -->")]
    number = re.search(r"\d+\.\d+", block)
    assert number is not None
    stale = text.replace(block, block.replace(number[0], "9999.9"))
    assert stale != text and readme.filled(page, stale) == text


@each_page
def test_a_missing_block_is_named(page):
    name = readme.PAGES[page][0]
    with pytest.raises(ValueError, match=f"{page.name}: wanted one block '{name}', got 0"):
        readme.filled(page, page.read_text().replace(f"<!-- {name}:end -->", ""))


def test_of_several_rows_of_a_job_the_last_counts(tmp_path, monkeypatch):
    lines = (readme.RESULTS / "real" / "results.jsonl").read_text().splitlines()
    earlier = [json.dumps(json.loads(line) | {"told": 1.0, "prefill": 1.0}) for line in lines]
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "results.jsonl").write_text("\n".join([*earlier, *lines]))
    wanted = readme.real_block()
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.real_block() == wanted


@pytest.mark.parametrize(
    "quick, options, said", [(True, [], "a quick demo"), (False, ["--check"], "--check changes no file")]
)
def test_results_of_a_demo_are_not_taken(quick, options, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"quick": quick}))
    monkeypatch.setattr(readme.shutil, "copyfile", lambda *_: pytest.fail("a result was replaced"))
    monkeypatch.setattr("sys.argv", ["readme", "--demo", str(tmp_path), *options])
    with pytest.raises(SystemExit):
        readme.main()
    assert said in capsys.readouterr().err
