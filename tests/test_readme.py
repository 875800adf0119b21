"""The README says what the results say, and its code blocks are Python that names what exists."""

import ast
import pathlib
import re

import duet
import duet_kernels
from benchmarks import readme

README = pathlib.Path(readme.README)


def test_numbers_are_those_of_the_results():
    text = README.read_text()
    assert readme.filled(text) == text


def test_a_changed_number_is_noticed():
    text = README.read_text()
    begin = text.index("<!-- cpu:begin -->")
    end = text.index("<!-- cpu:end -->")
    block = text[begin:end]
    number = re.search(r"\d+ x faster", block)
    assert number is not None
    stale = text[:begin] + block.replace(number[0], "9999 x faster") + text[end:]
    assert readme.filled(stale) == text


def test_python_blocks_parse_and_import_public_names():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module in ("duet", "duet_kernels"):
                package = {"duet": duet, "duet_kernels": duet_kernels}[node.module]
                for name in node.names:
                    assert hasattr(package, name.name), name.name


def test_links_to_files_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / link).exists(), link
