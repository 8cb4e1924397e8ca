"""Whether what a run begins with fits it, what is taken of it, and which classes it knows too well."""

from typing import TYPE_CHECKING

from rich.console import Console

from dml_core.data.datasets import Splits
from pipelines.config.schema import Config
from pipelines.console import print_notes
from pipelines.models.checkpoint import read_class_names
from pipelines.models.start import OpenStart, take_over

if TYPE_CHECKING:
    from dml_core.learner import Learner


def check_start(start: OpenStart, learner: "Learner", config: Config, splits: Splits, console: Console) -> str:
    """Give a learner its start, and say what is taken and which classes to test on the start was trained on.

    Args:
        start: What the run begins with.
        learner: As initialised, for this check alone.
        config: Of the run.
        splits: Of its set.
        console: Where it is said.

    Returns:
        How many of the test classes the start was trained on, as a text; empty where there are none.

    Raises:
        ValueError: The start's network does not fit.
    """
    try:
        taken = take_over(learner, start.folder, config, splits.train.class_names)
    except ValueError as error:
        raise ValueError(f"{start.key}={start.text}: {error}") from None
    line = taken.describe(start)
    if start.is_new_network:
        line += f"; backbone.weights={config.backbone.weights}, as in {start.start.name}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    if splits.validation:
        _warn_of_known(start, "validation", {*splits.validation.query.class_names}, console)
    tested = {name for task in splits.tests.values() for name in task.query.class_names}
    return _warn_of_known(start, "test", tested, console)


def _warn_of_known(start: OpenStart, kind: str, classes: set[str], console: Console) -> str:
    """Say which classes of a kind a start was trained on, by name. Return how many of them; empty: none."""
    known = sorted(classes & {*read_class_names(start.folder)})
    if not known:
        return ""
    share, first = f"{len(known)} of {len(classes)}", ", ".join(known[:3]) + ", ..." * (len(known) > 3)
    line = f"{start.key}: {start.start.name} was trained on {share} {kind} classes, by name ({first}): "
    line += (
        "test metrics are not those of unseen classes" if kind == "test" else "the best epoch is chosen by them, too"
    )
    print_notes(console, [line])
    return share
