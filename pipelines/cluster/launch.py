"""Run a loop on workers of Ray Train."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from rich.console import Console

from dml_core.cpus import usable_cpus
from pipelines.cluster.failures import call_interruptibly, explain_failure
from pipelines.cluster.network import GroupConfig
from pipelines.cluster.progress import Follower, LocalBoard, Message, News
from pipelines.cluster.worker import Job, Worker, enter
from pipelines.tracking.records import EpochRecord

NODE_ID_LABEL = "ray.io/node-id"  # which every node of Ray has


class RemoteBoard:
    """A board in an actor, which rank 0 and the driver reach from their nodes."""

    def __init__(self, actor: ActorHandle):
        self.actor = actor

    def write(self, message: Message) -> None:
        self.actor.write.remote(message)

    def record(self, records: Sequence[EpochRecord]) -> None:
        self.actor.record.remote(records)

    def read(self, records_known: int) -> News:
        try:
            news: Any = ray.get(self.actor.read.remote(records_known), timeout=5)
        except ray.exceptions.RayError as error:
            raise ConnectionError("the board does not answer") from error
        return News(*news)


def run_on_workers(
    job: Job,
    storage: str,
    name: str,
    console: Console,
    keep: Callable[[EpochRecord], object] | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> Any:
    """Run a job's loop on `workers` workers, and show its progress.

    Args:
        job: Names its loop, and is what it is given.
        storage: A folder or URL below which Ray Train keeps its books; the config's own `storage`, or a scratch one.
        name: Of the folder in `storage`.
        console: Where progress is shown.
        keep: Called with each epoch's record; None: nobody wants them.
        callbacks: Of Ray Train.

    Returns:
        What the loop returns on rank 0.

    Raises:
        RunFailed: Workers failed; the message is the first cause.
    """
    config = job.config
    fewest, most = config.worker_range
    nodes = len(ray.nodes())
    cores = usable_cpus() if nodes == 1 else ray.cluster_resources()["CPU"]
    max_failures = (3 if nodes > 1 else 0) if config.max_failures is None else config.max_failures
    # On the node of this process, which is lost last.
    this_node = {NODE_ID_LABEL: ray.get_runtime_context().get_node_id()}
    board_class: Any = ray.remote(num_cpus=0)(LocalBoard)  # Ray's decorator has no type for it
    board = RemoteBoard(board_class.options(label_selector=this_node).remote())
    job = replace(job, worker=Worker(cpus=max(1, int(cores // most)), board=board))
    must_see = f"{storage}/{name}/run.json" if storage == config.storage else None
    workers: Any = fewest if fewest == most else (fewest, most)
    callback_list: Any = [*callbacks]
    trainer = DataParallelTrainer(
        # Not as train_loop_config, which Ray would print on its page.
        partial(enter, job, must_see),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=bool(config.use_gpu),
            resources_per_worker={"CPU": 1.0} | ({"GPU": config.gpus_per_worker} if config.use_gpu else {}),
        ),
        backend_config=GroupConfig("nccl" if config.use_gpu else "gloo", config.timeout),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            callbacks=callback_list,
        ),
    )
    with Follower(board, console, "waiting for the workers", keep):
        try:
            return call_interruptibly(partial(_fit, trainer))
        except Exception as error:
            raise explain_failure(error) from error


def _fit(trainer: DataParallelTrainer) -> Any:
    """Train, and return what the loop returned on rank 0. Ray's annotations are still those of its first version."""
    result: Any = trainer.fit()
    return result.return_value
