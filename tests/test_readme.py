"""README.md and docs/ say what the results say. That what they show runs is `test_docs`."""

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
