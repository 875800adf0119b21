"""Each row counts once: the loss of rows to evaluate on, and the last batch of an epoch on several processes.

The means of an evaluation are over the scored positions of the whole set, however it is cut into batches.
The Trainer takes the mean of the batches' losses, weighted by their rows. So a batch's loss is divided by the counts of the
whole set, as a micro-batch's is by those of its step, and returned times (rows of the set / rows of the batch).
"""

from typing import Any

import torch

from ..data.dataset import UnlearnDataset, first_rows
from ..data.rows import read_rows
from ..names import check_known
from .asking import Asking
from .objectives import Counts


def check_fills_a_batch(rows: int, args: Any) -> None:
    """Refuses `dataloader_drop_last` where an epoch has no whole batch: no step would be made."""
    of_all = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < of_all:
        raise ValueError(
            f"dataloader_drop_last: wanted False, got True, because an epoch has {rows} rows, fewer than one batch of all "
            f"processes ({of_all}); or a smaller per_device_train_batch_size"
        )


class WholeSetLoss(Asking):
    """The part of `DuetTrainer` that evaluates, and that leaves out rows which accelerate repeats."""

    _rows = 0  # of the set, on all processes
    _counts: Any  # `Counts` of the set

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """`Trainer._get_dataloader`; `dataloader_drop_last` drops rows of training alone."""
        asked = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = asked and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = asked

    def get_batch_samples(self, epoch_iterator: Any, *args: Any) -> Any:
        """`Trainer.get_batch_samples`; rows that are repeated at the end of an epoch are in no loss and no count."""
        rows = 0 if self.args.dataloader_drop_last else len(self._sampler)
        own = (self._unrepeated(batch, rows, self._train_batch_size)[0] for batch in epoch_iterator)
        return super().get_batch_samples(own, *args)

    def _unrepeated(self, batch: dict[str, Any], total: int, size: int) -> tuple[dict[str, Any], int]:
        """(this process's batch without the rows that accelerate repeats in the last ones, how many rows all processes have)"""
        of_all = size * self.accelerator.num_processes
        rest = total % of_all
        if not rest or not self.accelerator.gradient_state.end_of_dataloader:
            return batch, of_all
        return first_rows(batch, max(0, rest - self.accelerator.process_index * size)), rest

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`Trainer.evaluate`; a dict's names that start with `retain` are read here, because the Trainer passes on rows without names."""
        if isinstance(eval_dataset, dict):
            eval_dataset = self._views.evaluated(eval_dataset, self._train_subjects)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """`Trainer.get_eval_dataloader` of rows, or of the name of some in `DuetTrainer(eval_dataset={name: rows})`."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise ValueError("eval_dataset: wanted rows, here or in DuetTrainer(eval_dataset=...), got none")
        if named := isinstance(rows, str):
            names = self.eval_dataset if isinstance(self.eval_dataset, dict) else ()
            check_known("eval_dataset.", [rows], names)
        dataset = self._ready(self.eval_dataset[rows] if named else rows, "eval_dataset")
        return super().get_eval_dataloader(rows if named else dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """For `predict(rows)`: rows as in `eval_dataset`; their loss is a metric, and nothing else is predicted."""
        return super().get_test_dataloader(self._ready(test_dataset, "test_dataset"))

    def _ready(self, rows: Any, argument: str) -> UnlearnDataset:
        """The dataset of rows, of which the teacher has been asked what it must be."""
        if self.objective.loss is None:
            raise ValueError(f"{argument}: wanted none, objective {self.args.objective!r} has no loss")
        made = isinstance(rows, UnlearnDataset)
        dataset = rows if made else self._views.dataset(read_rows(rows, argument), [])
        self.prepare_rows(dataset)
        return dataset

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.evaluation_loop`; what the set holds is counted first."""
        dataset = dataloader.dataset
        self._rows = len(dataset)
        totals = [self.objective.count(self.data_collator([dataset[i]])) for i in range(self._rows)]
        self._counts = Counts.of(torch.stack(totals).sum(0).to(self.args.device))
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        inputs, rows = self._unrepeated(inputs, self._rows, self.args.eval_batch_size)
        with torch.no_grad():
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=self._counts)
        # Every process holds its share: the Trainer, which cuts off what it takes for repeats, needs the whole.
        shares: Any = self.accelerator.gather(loss.detach().reshape(1))
        return shares.mean() * self._rows / rows, None, None
