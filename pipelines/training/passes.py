"""How a worker's network and loss run: compiled where the config says so, and on a GPU as CUDA graphs."""

from collections.abc import Sequence

import torch

from dml_core.learner import Learner
from dml_core.passes import GraphRecorder, Passes, RecordedLoss, RecordedPasses
from pipelines.data.features import BATCH
from pipelines.data.sources import Sources


def prepare_passes(learner: Learner, sources: Sources, generators: Sequence[torch.Generator] = ()) -> None:
    """Compile a learner's network, if asked, and let its passes and its loss be recorded on a GPU.

    Args:
        learner: On its device already.
        sources: Of its batches.
        generators: All that its loss draws from.
    """
    backbone, batch = learner.backbone, BATCH[sources.device.type]
    fast = torch.compile(backbone, dynamic=False) if sources.config.backbone.compile else None
    if sources.device.type == "cuda":
        parameters, _ = learner.trained
        say, record = sources.progress.say, GraphRecorder()
        learner.passes = RecordedPasses(backbone, fast, batch, sources.autocast, parameters, say, record)
        on_gpu = [generator for generator in generators if generator.device.type == "cuda"]
        learner.run_loss = RecordedLoss(generators, [*learner.buffers()], say, GraphRecorder(on_gpu))
    else:
        learner.passes = Passes(backbone, fast, batch)
