"""Test metrics of a trained model, on its own test classes or on other pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from rich.console import Console

from pipelines.config.schema import Config, flatten
from pipelines.console import messages, print_notes, stage
from pipelines.models.checkpoint import read_class_names, read_config, read_data
from pipelines.models.find import find_checkpoint

if TYPE_CHECKING:  # of torch
    from dml_core.data.datasets import Retrieval

SET_KEYS = ("data.name", "data.root", "data.table")  # that say which pictures they are
# By which the run's own set is divided: not carried over to another one.
SPLIT_KEYS = ("test_fraction", "test_classes", "validation_fraction", "fold", "folds", "limit_classes")
TESTED_BY = ("data.test_fraction", "data.test_classes")  # which say of any set what of it is tested


class Tested(TypedDict):
    """What was tested: how many pictures of how many classes, and which part they take."""

    pictures: int
    classes: int
    queries: int
    gallery: int
    queries_without_match: int


class Evaluation(TypedDict):
    """What `dml evaluate --json` prints.

    Attributes:
        checkpoint: Its folder.
        tested: Of the test whose metrics begin with test/.
        metrics: Test metrics by name.
        out: The file that has a row for each query, where one was asked for.
    """

    checkpoint: str
    tested: Tested
    metrics: dict[str, float]
    out: NotRequired[str]


def evaluate_run(
    run: str, assignments: Mapping[str, Any], console: Console = messages, out: str | None = None
) -> Evaluation:
    """Measure a trained model on its own test classes or, with other config values, on other data.

    Of a set that is not the one of the training every picture is used, unless the set itself, data.test_fraction or
    data.test_classes say what is tested.

    Args:
        run: An MLflow run id, a checkpoint folder or URL, or models:/NAME@ALIAS.
        assignments: Config values to replace, nested or by dotted keys.
        console: Where progress is shown.
        out: A new Parquet file for a row of each query, see training/query_rows.py.

    Raises:
        ValueError: Bad input, before any worker starts.
        RunFailed: Workers failed.
    """
    folder = find_checkpoint(run)  # before torch is imported: what is not there is refused at once
    values = flatten(dict(assignments))
    trained_by = read_config(folder)
    others = names_other_pictures(trained_by, values)
    with stage(console, "starting"):
        from pipelines.data.parts import join_parts, prepare_output, remove_parts
        from pipelines.data.sets import load_collection, load_tests
        from pipelines.kept import keep_meanwhile
        from pipelines.runs.with_model import open_model, run_with_model
        from pipelines.training.job import EvaluationJob
        from pipelines.training.query_rows import COLUMNS

    with keep_meanwhile():  # the set is listed once
        model = open_model(folder, (_values_of_others(trained_by, values) if others else {}) | values, console)
        before = read_data(folder)
        if others and before and model.data.pictures == before.pictures:  # they have only moved
            others, model = False, open_model(folder, values, console)
        every = others and not any(values.get(key) for key in TESTED_BY)
        with stage(console, "reading the data"):
            tests = load_tests(model.config, model.unreadable, every)
            print_notes(console, load_collection(model.config.data).notes)
    test = tests["test"]
    tested = describe_task(test)
    if tested["queries_without_match"] == tested["queries"]:
        raise ValueError(
            f"no query has a match: none of the {tested['queries']} queries of {tested['classes']} classes has another "
            f"picture of its class in the gallery{'' if test.query.cameras is None else ' by another camera'}; "
            "a class needs two pictures at least"
        )
    if out is not None and test.draws:
        raise ValueError(
            f"--out {out}: cannot act on {model.config.data.name}, whose galleries are drawn several times"
        )
    output = None if out is None else prepare_output(out)
    console.print(_say_what_is_tested(tested, test), highlight=False, markup=False, soft_wrap=True)
    _warn_of_known_classes(read_class_names(folder), test, console)
    job = EvaluationJob(model.config, model.unreadable, model.data, every=every, out=output and output.address)
    try:
        metrics, workers = run_with_model(model, job, "evaluate", console)
        if output:
            join_parts(output, COLUMNS, tested["queries"], workers)
    finally:
        if output:
            remove_parts(output)
    evaluation = Evaluation(checkpoint=str(model.checkpoint), tested=tested, metrics=metrics)
    return evaluation | {"out": output.address} if output else evaluation


def names_other_pictures(trained_by: Config, values: Mapping[str, Any]) -> bool:
    """Whether values, by dotted keys, name pictures that are in another place than those of a training."""
    trained = trained_by.flat()

    def place(value: object) -> str:
        text = str(value)
        return text if "://" in text or value is None else str(Path(text).expanduser().resolve())

    return any(key in values and place(values[key]) != place(trained.get(key)) for key in SET_KEYS)


def _values_of_others(trained_by: Config, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values, by dotted keys, that take away what belongs to the set of the training alone."""
    taken_away: dict[str, Any] = {f"data.{key}": None for key in SPLIT_KEYS}
    if values.get("data.name", trained_by.data.name) != trained_by.data.name:
        taken_away |= {f"data.{key}": None for key in ("root", "table", "pattern", "exclude")}
        taken_away |= {"data.download": False, "data.links": False}
    return taken_away


def describe_task(task: "Retrieval") -> Tested:
    """Count a task's pictures, classes, queries and gallery items."""
    import numpy as np

    from pipelines.data.check import lacks_match

    query, gallery = task.query, task.gallery or task.query
    drawn = len(np.unique(query.labels)) if task.draws else 0
    both = int((task.query_positions() >= 0).sum()) if task.gallery else len(query)
    return Tested(
        pictures=len(query) + len(gallery) - both,
        classes=len(np.unique(np.concatenate([query.labels, gallery.labels]))),
        queries=len(query) - drawn,
        gallery=drawn or len(gallery),
        queries_without_match=0 if task.draws else int(lacks_match(task).sum()),
    )


def _say_what_is_tested(tested: Tested, task: "Retrieval") -> str:
    against = "each against all others" if task.gallery is None else f"a gallery of {tested['gallery']:,}"
    if task.draws:
        against = f"a gallery of {tested['gallery']:,}, drawn {task.draws} times"
    without = tested["queries_without_match"]
    return (
        f"testing {tested['pictures']:,} pictures of {tested['classes']:,} classes: {tested['queries']:,} queries, "
        f"{against}" + (f"; {without:,} queries have no match and are left out" if without else "")
    )


def _warn_of_known_classes(trained: tuple[str, ...], task: "Retrieval", console: Console) -> None:
    known = [name for name in task.query.class_names if name in {*trained}]
    if known:
        line = (
            f"{len(known)} of the {len(task.query.class_names)} classes are called like classes of the training, "
            f"{known[0]} first: on classes that it has not seen a model does worse"
        )
        print_notes(console, [line])
