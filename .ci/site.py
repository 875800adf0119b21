"""What the site needs beside docs/: a hook of mkdocs, and an extension of griffe, which reads the docstrings."""

import pathlib
import re

import griffe
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
# In the site under the same path as in the repository, so that a link is the same in both.
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


class Examples(griffe.Extension):
    """griffe shows doctests as code under `Examples:`; our docstrings say `Example:`."""

    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
