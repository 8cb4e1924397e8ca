"""How a worker's network runs: compiled where the config says so, and on a GPU as CUDA graphs."""

import torch

from dml_core.learner import Learner
from dml_core.passes import GraphRecorder, Passes, RecordedPasses
from pipelines.data.features import BATCH
from pipelines.data.sources import Sources


def prepare_passes(learner: Learner, sources: Sources) -> None:
    """Compile a learner's network, if asked, and let its passes be recorded on a GPU. It is on its device already."""
    backbone, batch = learner.backbone, BATCH[sources.device.type]
    fast = torch.compile(backbone, dynamic=False) if sources.config.backbone.compile else None
    if sources.device.type == "cuda":
        parameters, _ = learner.trained
        say, record = sources.progress.say, GraphRecorder()
        learner.passes = RecordedPasses(backbone, fast, batch, sources.autocast, parameters, say, record)
    else:
        learner.passes = Passes(backbone, fast, batch)
