"""An objective, its options and rows -> the UnlearnDataset that the trainer reads and the teacher is asked about.

One place for it: what `duet cache` asked the teacher must be what training looks for. Must not know models.
"""

from collections.abc import Sequence

from ..config import DEFAULT_REVERSE_PROMPTS, DuetConfig
from ..data.dataset import Query, UnlearnDataset
from ..data.prompts import PromptRenderer
from .objectives import Objective


def scored_positions(objective: Objective, args: DuetConfig) -> str:
    """`first`, `first_n`, `answer`, `text` or `prepared`: which positions this objective scores under these options.

    Raises:
        ValueError: `positions` does not go with the objective.
    """
    own = objective.positions
    if own == "prepared" and args.positions is not None:
        raise ValueError(
            f"positions: objective {args.objective!r} chooses its own, wanted None, got {args.positions!r}"
        )
    if args.positions == "text" and _steered(objective):
        raise ValueError(
            f"positions: 'text' scores the prompt too, and the steered teacher of {args.objective!r} sees another "
            "prompt than the student; wanted 'first', 'first_n' or 'answer'"
        )
    return args.positions or own


def build_dataset(
    forget: Sequence[Query],
    retain: Sequence[Query],
    objective: Objective,
    args: DuetConfig,
    renderer: PromptRenderer,
    max_length: int | None,
    subjects: Sequence[str] | None = None,
    cache_seed: int | None = None,
) -> UnlearnDataset:
    """The dataset of these rows.

    Args:
        forget, retain: queries, read.
        objective, args: what is scored, and how it is shown.
        renderer: turns conversations into ids.
        max_length: of a sequence; None: no limit.
        subjects: what prefixes on retain rows are about; None: the subjects of the forget rows.
        cache_seed: of the subjects of retain rows in a cached teacher; None: no cache.
    """
    positions = scored_positions(objective, args)
    max_scored = {"first": 1, "first_n": args.num_positions}.get(positions)
    answers = "dataset" if objective.needs_answers else args.answer_source
    if positions == "prepared":
        answers = "prepared"
    elif positions == "first" and not objective.needs_answers:
        answers = "none"
    elif answers == "teacher":
        max_scored = min(max_scored or args.max_answer_tokens, args.max_answer_tokens)
    reverse_prompts = args.reverse_prompts
    if objective.adversarial and not reverse_prompts:
        reverse_prompts = DEFAULT_REVERSE_PROMPTS
    return UnlearnDataset(
        forget,
        retain,
        renderer,
        args.steering_prefixes if _steered(objective) else [],
        reverse_prompts=reverse_prompts,
        reverse_fraction=args.reverse_prompt_fraction,
        reverse_role=args.reverse_prompt_role,
        answers=answers,
        max_scored=max_scored,
        max_length=max_length,
        subjects=subjects,
        seed=args.seed if cache_seed is None else cache_seed,
        refusals=args.refusals if objective.refuses else (),
        whole_text=positions == "text",
        prefills=args.prefills,
        prefill_fraction=args.prefill_fraction,
        fixed_subjects=cache_seed is not None or args.retain_subjects == "fixed",
    )


def asked_before_training(objective: Objective, args: DuetConfig) -> bool:
    """Whether all that the loss wants of a teacher can be made before the first step: the model teaches itself then.

    So it is where targets are prepared (`duet_deep`), and where they are few numbers along what the student is shown and
    every row is shown to it in one way: no reverse prompts and no forced openings, which are drawn at each use.
    """
    if objective.targets is None:
        return objective.prepare is not None
    drawn = bool(args.reverse_prompts or objective.adversarial or args.prefills)
    return objective.storable and objective.teacher_sees == "student" and not drawn


def _steered(objective: Objective) -> bool:
    return objective.targets is not None and objective.teacher_sees == "steered"
