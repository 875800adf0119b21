"""What prompts under one steering prefix begin with is read by a live teacher once, not at every step.

    rows -> every filled prefix -> the tokens that all prompts under it begin with -> keys and values, kept on the device
    a batch -> which prefix each row has, and the rest of its prompt -> hidden states

The teacher is frozen, so that keys and values stay what they are. Where that cannot be, or does not pay, whole prompts are read,
and the log says why.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from duet_kernels.dispatch import workspace_bytes

from ..data.dataset import UnlearnDataset
from ..model.lm import base_language_model
from ..model.loading import is_sharded
from ..model.prefix_cache import PrefixTable, bytes_per_token, cannot_reuse, common_length

logger = logging.get_logger(__name__)

SHORTEST = 8  # tokens; below, copying keys and values costs more than reading them again
_SAMPLED_ROWS = 32  # whose prompts say how much all prompts under a prefix have in common
_CHECKED_ROWS = 4


def reused_prefixes(trainer: Any, packed: bool) -> "ReusedPrefixes | None":
    """What reads the steering prefixes of a run once, if its teacher is a live one that can; else the log says why not."""
    if trainer.teacher is None or not trainer.teacher.watched:
        return None
    args, why = trainer.args, None
    if not args.reuse_prefix:
        why = "reuse_prefix is off"
    elif packed:
        why = "batches are packed, which flash-attn reads without keys and values from elsewhere"
    elif is_sharded(args):
        why = "parameters are sharded, and all processes must run the same forwards"
    elif args.bf16_full_eval or args.fp16_full_eval:
        why = "evaluation runs in another dtype than training"
    if why is not None:
        logger.info(f"the teacher reads whole prompts: {why}")
        return None
    return ReusedPrefixes(trainer)


class ReusedPrefixes:
    """The steering prefixes of a run, read once, whatever number of datasets shows them; `trainer` has a live teacher."""

    def __init__(self, trainer: Any):
        self.trainer, self.table = trainer, PrefixTable()
        # every prefix in the table: its text -> (its number, the ids that were read)
        self._read: dict[str | None, tuple[int, list[int]]] = {}

    def _ask(self, function: Callable[[nn.Module], Any]) -> Any:
        """`function` of the frozen teacher, as it is asked in a step."""
        with self.trainer.accelerator.autocast():
            return self.trainer.ask_teacher(function)

    def serve(self, dataset: UnlearnDataset, uses: int) -> None:
        """From now on the items of `dataset` say which prefix they begin with, if reading it once pays.

        Args:
            dataset: whose prompts the teacher reads.
            uses: how many of its items will be read.
        """
        if not dataset.prefixes or dataset.beginnings is not None:
            return
        dataset.beginnings = {}
        why = self._serve(dataset, uses)
        if why is not None:
            dataset.beginnings = {}
            logger.info(f"the teacher reads whole prompts: {why}")

    def _serve(self, dataset: UnlearnDataset, uses: int) -> str | None:
        why = self._ask(cannot_reuse)
        if why is not None:
            return why
        beginnings = beginnings_of(dataset)
        known = {t: ids for t, (_, ids) in self._read.items() if beginnings.get(t, [])[: len(ids)] == ids}
        beginnings |= known
        new = [text for text in beginnings if text not in known]
        longest = max(map(len, beginnings.values()), default=0)
        if longest < SHORTEST:
            return f"under one prefix they share {longest} tokens, less than {SHORTEST}"
        if 2 * len(new) > uses:
            return f"{len(new)} prefixes for {uses} prompts"
        first = len(self.table.lengths)
        rows = first + len(new)
        needed = rows * longest * self._ask(bytes_per_token)
        allowed = workspace_bytes(self.trainer.args.device)
        if needed > allowed:
            return (
                f"keys and values of {rows} prefixes of up to {longest} tokens take {needed / 2**20:.0f} MiB, more than the "
                f"workspace of {allowed / 2**20:.0f} MiB"
            )
        if new:
            ids = [beginnings[text] for text in new]
            self._ask(lambda model: self.table.add(model, ids, self.trainer.args.eval_batch_size))
        self._read |= {text: (first + i, beginnings[text]) for i, text in enumerate(new)}
        dataset.beginnings = {text: self._read[text] for text in beginnings}
        why = self._differs([dataset[i] for i in range(min(_CHECKED_ROWS, len(dataset)))])
        if why is None:
            logger.info(
                f"the teacher reads {len(beginnings)} steering prefixes of up to {longest} tokens once; keys and values take "
                f"{self.table.nbytes / 2**20:.0f} MiB"
            )
        return why

    def _differs(self, items: list[dict[str, Any]]) -> str | None:
        """Whether hidden states with reused prefixes are those of whole prompts, up to rounding."""
        trainer, args = self.trainer, self.trainer.args

        def states(items: list[dict[str, Any]]) -> Tensor:
            inputs = trainer._prepare_inputs(trainer.data_collator(items))
            return trainer.ask_teacher(lambda model: trainer.head_inputs(model, inputs, "teacher_")[0])

        whole = states([{k: v for k, v in item.items() if k != "beginning"} for item in items])
        worst, largest = (states(items) - whole).abs().amax().item(), whole.abs().amax().item()
        half = args.bf16 or args.fp16 or base_language_model(trainer.model).dtype.itemsize < 4
        if worst <= (5e-2 if half else 1e-4) * largest:
            return None
        return f"with reused keys and values the hidden states differ by {worst:.3g} of {largest:.3g}"


def beginnings_of(dataset: UnlearnDataset) -> dict[str | None, list[int]]:
    """Each steering prefix that the dataset can show -> the token ids that prompts under it begin with.

    Where retain rows are shown without a prefix, None -> what all plain prompts begin with, if they share anything.

    How many they share is seen on some rows under one prefix; under the others, on the two of them that share least.
    """
    instructions = dataset.instructions()
    rows = range(0, len(dataset), max(1, len(dataset) // _SAMPLED_ROWS))
    prompts = {i: dataset.prompt(i, instructions[0]) for i in rows}
    # What the first and the last in order share, all between them share.
    ends = min(prompts, key=prompts.__getitem__), max(prompts, key=prompts.__getitem__)
    found = {}
    for text in instructions:
        both = [dataset.prompt(i, text) for i in ends]
        if shared := common_length(both):
            found[text] = both[0][:shared]
    return found
