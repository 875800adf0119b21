"""CachedTeacher: a TopKStore in the place of a teacher, for training without one."""

from functools import partial
from typing import Any

from torch import nn

from duet_kernels import TopK

from ..data.dataset import UnlearnDataset
from ..model.teacher import Function, Teacher
from .read import TopKStore, fingerprint


class CachedTeacher(Teacher):
    """Reads the targets where the rows are (in the data loader's processes); they travel with the batch.

    Args:
        store: opened; whether it fits the run is for the caller to check.
        k: so many of the stored logits are used.
    """

    watched = False

    def __init__(self, store: TopKStore, k: int):
        self.store, self.k = store, k

    def serve(self, dataset: UnlearnDataset, ask: Any = None) -> None:
        """From now on the rows of `dataset` carry this teacher's targets, and its answers where it was asked for them.

        Raises:
            ValueError: a row whose targets are not in the store; the row is named.
        """
        places = {}
        for asked in dataset.asked():
            entry_id = fingerprint(asked.plain, asked.steered, asked.answer)
            if entry_id not in self.store:
                made = self.store.rows.get(asked.name)
                why = (
                    "it has no row of that name"
                    if made is None
                    else "that row, or what it is asked with, was another when it was made"
                )
                raise ValueError(
                    f"teacher_store: rows: {self.store.folder} has nothing for {asked.where}: {why}."
                    " The rows to forget, those to retain, steering_place or retain_prefix differ from what was cached; cache these"
                )
            places[asked.key] = entry_id
            if dataset.answers == "teacher":
                dataset.teacher_answers[asked.key] = self.store.read(entry_id).answer
        # Small enough to be sent to the data loader's processes.
        dataset.cached_targets = partial(_stored, self.store, self.k, places)

    def targets(self, stored: Any, function: Function, student: nn.Module, wrapped: nn.Module) -> TopK:
        return TopK(**stored, temperature=self.store.provenance.temperature)

    def run(self, function: Function, student: nn.Module, wrapped: nn.Module) -> Any:
        raise RuntimeError(
            "teacher_store: this run has no teacher model, only its stored targets, and something asked the model; "
            "train without teacher_store"
        )


def _stored(
    store: TopKStore, k: int, places: dict[tuple[int, int], bytes], key: tuple[int, int]
) -> dict[str, Any]:
    """The targets of a row under a prefix, as plain tensors."""
    targets = store.read(places[key], k).targets
    return {name: getattr(targets, name) for name in ("values", "indices", "tail_logsumexp")}
