"""Train one run, from the driver: checks, the run's folder, MLflow's run, workers, the outcome."""

import contextlib
import importlib
import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from dml_core.data.datasets import SetIdentity, Splits
from pipelines.cluster.address import cluster_address, require_cluster
from pipelines.cluster.devices import describe_workers, has_cluster, needs_ray, resolve_devices, resolve_workers
from pipelines.cluster.failures import call_in_thread
from pipelines.config.identity import require_same, with_absolute_paths, with_slices
from pipelines.config.schema import AUTO, Config
from pipelines.console import messages, print_notes, stage
from pipelines.data.check import identify_again, require_pictures, unreadable_pictures
from pipelines.data.sets import cache_folder, load_splits
from pipelines.kept import keep_meanwhile
from pipelines.models.run_folder import RunFolder, checkpoint_name
from pipelines.models.start import OpenStart, keep_start, open_start
from pipelines.phases import Clock, Phase
from pipelines.runs.log import logged_to
from pipelines.runs.outcome import SweepMember, TrainOutcome
from pipelines.runs.record import Lineage, record_training, register_model, with_experiment
from pipelines.runs.start import check_start
from pipelines.tracking.address import default_uri
from pipelines.tracking.models import import_for_log_model
from pipelines.tracking.process import SameProcess
from pipelines.tracking.records import EpochRecord
from pipelines.tracking.runs import end_run, resume_run
from pipelines.tracking.sender import MetricSender
from pipelines.tracking.server import prepare_run
from pipelines.training.job import TrainingJob, TrainingResult


class Inputs(NamedTuple):
    """A run's data, checked.

    Attributes:
        data: What the set is.
        splits: Of the set.
        unreadable: Names of pictures that are left out.
        seen_classes: How many of the test classes the start was trained on, as of check_start.
    """

    data: SetIdentity
    splits: Splits
    unreadable: tuple[str, ...]
    seen_classes: str = ""


def run_training(
    config: Config,
    console: Console = messages,
    here: bool = False,
    member: SweepMember | None = None,
    tracker: Executor | None = None,
    started: float | None = None,
    switch_gradients: bool = False,
) -> TrainOutcome:
    """Train, test and log a run; or continue, or repeat the outcome of, the run of the same name.

    It runs on workers of Ray Train, or in this process where Ray has nothing to add (cluster.in_process.needs_ray).

    Args:
        config: Of the run.
        console: Where messages and progress go.
        here: In this process, whatever Ray there is.
        member: What a run that belongs to a sweep is given.
        tracker: Calls what speaks to MLflow, see tracking.process; None: this process.
        started: When the command began, in seconds since 1970; None: now.
        switch_gradients: Whether a run that goes on may do so with other `gradients` than it was begun with.

    Raises:
        ValueError: Bad input, before any worker starts.
        RunFailed: Workers failed on the way.
        KeyboardInterrupt: The run was stopped; likewise SystemExit, with which Ray Tune ends a trial.
    """
    clock, tracker = Clock(started), tracker or SameProcess()
    if started is not None:
        clock.lap("imports")
    started = started or clock.last
    if not here:
        require_cluster()
    config = with_absolute_paths(config)
    folder = RunFolder(config)
    uri = member.uri if member else default_uri(Path.cwd())
    earlier = folder.read("run.json")
    begun, reason = earlier and earlier["config"], ""
    config = config if member else with_experiment(config, begun)
    config, start = open_start(config, folder, begun)
    anew = f"without {folder.path}/run.json it goes on as a new run"
    store = tracker.submit(prepare_run, uri, str(config.experiment), (earlier or {}).get("run_id"), anew)
    config = with_slices(config, begun)  # is refused before it waits for a cluster
    if here or not has_cluster():
        config, reason = resolve_workers(config, here=here)
        config = with_slices(config, begun)
    may_differ = ["gradients"] if switch_gradients else []
    if earlier:  # again when devices are known, on which a precision that is left open depends
        open_keys = ["precision"] if config.precision is None else []
        require_same(config, earlier["config"], folder.path, may_differ + open_keys)
    log_folder = folder.logs or cache_folder() / "logs" / str(config.name)
    with logged_to(log_folder) as log, contextlib.ExitStack() as cluster:
        here = here or not needs_ray(config)
        if earlier and (result := folder.read("result.json")):
            if member is None:
                identify_again(config.data, f"name={config.name}", earlier, folder.path, console)
            console.print(f"{config.name} is finished; this is its outcome. Another name starts a new run.")
            return TrainOutcome.from_json(result)
        check = partial(check_inputs, config, earlier, folder, member, start, console)
        if here:
            inputs = _check_and_import(check, console, clock, store)
        else:
            inputs = _open_cluster_and_check(config, check, earlier is not None, console, folder, clock, cluster, store)
        if config.workers == AUTO:
            config, reason = resolve_workers(config)
            config = with_slices(config, begun)
        config = resolve_devices(config, here, None if member else console)
        facts = f"{describe_workers(config, reason)}, batch.slices={config.slices}, precision={config.precision}"
        console.print(facts, highlight=False, soft_wrap=True)
        if earlier:
            require_same(config, earlier["config"], folder.path, may_differ)
        run_id = _open_run(config, folder, earlier or {}, inputs, start, tracker, uri, member, console)
        if start:
            keep_start(folder, start)
        clock.lap("the run in MLflow")
        test = member is None or member.test
        job = TrainingJob(config, inputs.unreadable, inputs.data, started=started, test=test)
        (metrics, _, phases), unsent = _train(job, tracker, uri, run_id, console, here, member)
        if not here:
            clock.add(Phase("workers", clock.last, phases[0].begun - clock.last))
        for phase in phases:
            clock.add(phase)
        clock.last = time.time()
        best, model = checkpoint_name(int(metrics["best_epoch"])), None
        if job.test:
            registration = call_in_thread(
                partial(register_model, tracker, uri, run_id, config, folder, best, inputs.splits)
            )
            cluster.close()  # which takes Ray a second
            try:
                with stage(console, "registering the model"):
                    model = registration.result()
            except Exception as error:
                logging.getLogger(__name__).exception("the model is not registered")
                unsent += 1
                reason = str(error).splitlines()[0]
                console.print(f"the model is not registered: {reason} ({log} has the traceback)", style="yellow")
            clock.lap("registration")
    outcome = TrainOutcome(
        run_id=run_id,
        experiment=str(config.experiment),
        checkpoint=f"{config.storage}/{config.name}/{best}",
        metrics=metrics,
        seconds=time.time() - started,
        images_per_second=metrics["train/images_per_second"],
        name=str(config.name),
        model=model,
        phases=[phase._replace(begun=phase.begun - started) for phase in clock.phases.values()],
    )
    if unsent:
        console.print(
            f"MLflow lacks a part of this run; `dml train name={config.name} ...` again sends it", style="yellow"
        )
    else:
        folder.write("result.json", outcome._asdict())
    return outcome


def _check_and_import(check: Callable[[], Inputs], console: Console, clock: Clock, store: Future[None]) -> Inputs:
    """Check the inputs, and import what a training in this process needs while MLflow's process is busy.

    A store that refuses ends a long look at the inputs.
    """
    checked = call_in_thread(check)
    both: list[Future[Any]] = [checked, store]
    wait(both, return_when=FIRST_COMPLETED)
    if store.done():
        store.result()
    inputs = checked.result()
    clock.lap("data")
    with stage(console, "importing torch and the losses"):
        for module in (TrainingJob.loop.partition(":")[0], "dml_core.base_losses"):
            importlib.import_module(module)
    store.result()
    clock.lap("imports")
    return inputs


def _open_run(
    config: Config,
    folder: RunFolder,
    earlier: dict[str, Any],
    inputs: Inputs,
    start: OpenStart | None,
    tracker: Executor,
    uri: str,
    member: SweepMember | None,
    console: Console,
) -> str:
    """Continue the run in MLflow that the folder knows, or start one, and write both down. Return its id.

    The folder has a key before MLflow has a run: one that is killed in between is found by it, and not started twice.
    """
    known = {"start_key": uuid.uuid4().hex, **earlier, "config": config.to_dict(), "unreadable": inputs.unreadable}
    known |= {"data": inputs.data._asdict()}
    if run_id := known.get("run_id"):
        console.print(f"continuing {config.name}")
        tags = {"workers": str(config.workers), "data_digest": inputs.data.digest}
        if config.gradients != earlier["config"].get("gradients", "exact"):
            tags["gradients"] = f"{config.gradients} since this run was continued"
        tracker.submit(resume_run, uri, run_id, tags).result()
    else:
        line = f"{folder.path}  (if interrupted, name={config.name} continues it)"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        folder.write("run.json", known)
        key = known["start_key"]
        lineage = Lineage(start, inputs.seen_classes) if start else None
        run_id = record_training(tracker, uri, config, inputs.data, inputs.unreadable, lineage, member, key)
    folder.write("run.json", known | {"run_id": run_id})
    return run_id


def _open_cluster_and_check(
    config: Config,
    check: Callable[[], Inputs],
    continues: bool,
    console: Console,
    folder: RunFolder,
    clock: Clock,
    cluster: contextlib.ExitStack,
    store: Future[None],
) -> Inputs:
    """Connect to or start Ray, which `cluster` closes, and check the inputs beside it, or before it.

    Args:
        check: Checks the inputs.
        continues: Whether the run goes on: over other pictures it is refused before Ray starts.
        config, console, folder, clock, cluster: Of the run.
        store: Done when MLflow's store is prepared, for which Ray waits.
    """

    def check_beside() -> Inputs:
        with clock.beside("data"):
            return check()

    checked = call_in_thread(check_beside)
    from pipelines.cluster.session import open_cluster  # Ray's import takes half a second

    store.result()
    if continues or checked.done():
        checked.result()  # what is refused by now need not wait for a Ray
    with stage(console, "connecting to Ray" if cluster_address() else "starting Ray"):
        cluster.enter_context(open_cluster(config, folder.logs))
    clock.lap("Ray")
    inputs = checked.result()
    clock.last = time.time()
    return inputs


def check_inputs(
    config: Config,
    earlier: dict[str, Any] | None,
    folder: RunFolder,
    member: SweepMember | None,
    start: OpenStart | None,
    console: Console,
) -> Inputs:
    """Read the data and build the learner once, so that what is wrong with them ends a run before any worker starts.

    Args:
        config: Of the run.
        earlier: The run's run.json, if it goes on.
        folder: Of the run.
        member: What a run that belongs to a sweep is given.
        start: What the run begins with.
        console: Where messages go.

    Raises:
        ValueError: The set is missing, too small, or not the one that the run was begun with; the network is unknown,
            or its weights are not here.
    """
    with keep_meanwhile():
        if member:
            data = member.data
        else:
            data = identify_again(config.data, f"name={config.name}", earlier, folder.path, console)
        known = tuple(earlier.get("unreadable", ())) if earlier else None
        unreadable = unreadable_pictures(config.data, data, console) if known is None else known
        with stage(console, "reading the data"):
            splits = load_splits(config, unreadable)
            print_notes(console, splits.notes)
            require_pictures(splits.train)
    inputs = Inputs(data, splits, unreadable)
    if not start and not _may_fail_to_build(config):
        return inputs
    with stage(console, "building the network"):
        from pipelines.models.build import build_learner

        try:
            learner = build_learner(config, len(splits.train.class_names), read_weights=start is None)
        except OSError as error:
            raise ValueError(f"backbone.weights={config.backbone.weights}: cannot be had here ({error})") from None
    loss, seen = learner.base_loss, ""
    if unused := learner.backbone.unused:
        from dml_core.weights import count

        line = f"backbone.weights={config.backbone.weights}: {count(unused)} of the file not used"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if start and not start.is_kept:
        seen = check_start(start, learner, config, splits, console)
    if loss and loss.needs_positives and config.batch.images < 2:
        raise ValueError(
            f"batch.images=1: loss.name={config.loss.name} compares images of one class and needs at least 2"
        )
    return inputs._replace(seen_classes=seen)


def _may_fail_to_build(config: Config) -> bool:
    """Whether building the learner can say more than its config has: the imports for it take seconds."""
    from_elsewhere = config.backbone.name != "small" or config.backbone.weights != "none"
    return from_elsewhere or bool(config.loss.arguments) or config.batch.images < 2


def _train(
    job: TrainingJob, tracker: Executor, uri: str, run_id: str, console: Console, here: bool, member: SweepMember | None
) -> tuple[TrainingResult, int]:
    """Run the training loop, send MLflow what it measures, and end MLflow's run as it ended.

    Returns:
        What the loop returns, and how many of its records MLflow did not take.
    """
    config, sender, status, patience = job.config, MetricSender(tracker, uri, run_id), "FAILED", 0.0

    def keep(record: EpochRecord) -> None:
        if job.test and not sender.known:
            tracker.submit(import_for_log_model)  # while the training goes on, and its workers have started
        sender.log(record)

    try:
        if here:
            from pipelines.cluster.in_process import run_in_process

            if job.test:
                tracker.submit(import_for_log_model)  # while the training runs
            result = run_in_process(job, console, sender.log, member.report if member else dict)
        else:
            from pipelines.cluster.launch import run_on_workers

            callbacks = member.callbacks if member else ()
            result = run_on_workers(job, config.storage, str(config.name), console, keep, callbacks)
        status, patience = "FINISHED", 30.0
        for record in result.records:
            sender.log(record)
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        unsent = sender.close(patience)
        tracker.submit(end_run, uri, run_id, status).result()
    return result, unsent
