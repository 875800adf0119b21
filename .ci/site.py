"""What the site needs beside docs/: a hook of mkdocs, and an extension of griffe, which reads the docstrings."""

import importlib
import inspect
import pathlib
import re
import sys

import griffe
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout's packages, not installed ones
# In the site under the same path as in the repository, whose folder docs/ is the site's root.
SHOWN = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "RECIPES.md",
    "duet_kernels/MATH.md",
    "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.png",
)


def on_files(files, config):
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of docs/ out of docs/, which hold in the repository: in the site these files are one folder nearer."""
    if page.file.src_dir != config.docs_dir:  # one of SHOWN
        return markdown
    nearer = "](" + "../" * page.file.src_uri.count("/")
    return markdown.replace(f"{nearer}../", nearer)


class Docstrings(griffe.Extension):
    """What a docstring says is what `help` shows; griffe shows doctests as code where `Example:` is `Examples:`."""

    def on_object(self, *, obj, **_):
        if obj.docstring is None:
            return
        text = obj.docstring.value
        if "{divergences}" in text:  # filled when the function is made
            module = importlib.import_module(obj.module.canonical_path)
            text = inspect.getdoc(getattr(module, obj.name))
        obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
