"""A step as PyTorch's DistributedDataParallel (DDP) takes it: faster where gradients are large, exact to rounding."""

import torch
from torch import Tensor, nn

from dml_core.gather import gather
from dml_core.learner import Learner, Terms, at_least_float32


class Replica(nn.Module):
    """What DDP wraps: a rank's rows in, the terms of the global batch out.

    The rows go through the backbone at once, and DDP sums gradients while they are computed, in an order that depends
    on the number of ranks. Its mean over ranks is the gradient of one process with the global batch (gather.gather says
    why), and equals that of `Learner.backward` but for rounding.

    Args:
        learner: The learner.
        autocast: The precision of the backbone.
    """

    def __init__(self, learner: Learner, autocast: torch.autocast):
        super().__init__()
        self.learner, self.autocast = learner, autocast

    def forward(self, x: Tensor, labels: Tensor, epoch: int, generator: torch.Generator, slices: int) -> Terms:
        """Compute the loss of a global batch, to be differentiated by `loss.backward()`. Arguments as of the learner's.

        Args:
            x: Images or features of this rank's slices.
            labels: (b,) their classes.
            epoch: The epoch of the training, from 0.
            generator: Draws the noise of the global batch; in the same state on every rank.
            slices: S, in which the global batch is dealt to ranks.

        Returns:
            The terms, the same on every rank.
        """
        with self.autocast:
            features = self.learner.features(x)
        terms = self.learner(gather(at_least_float32(features), slices), gather(labels, slices), epoch, generator)
        # DDP waits for the gradient of each parameter: a batch may leave out some of a loss.
        unused = sum(p.flatten()[0] for p in self.learner.trained[1])
        return terms._replace(loss=terms.loss + 0.0 * unused)
