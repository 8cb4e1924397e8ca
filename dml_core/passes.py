"""Passes of slices through the network, forward and backward to the gradient of each slice, and the loss behind it.

A slice is a small batch, for which a GPU waits longer for its next kernel than it computes; the loss of a global batch
is some hundred kernels on small matrices. All slices, and all global batches, have one shape, so that on a GPU the
kernels of a pass are recorded once as a CUDA graph, and replayed by a single launch: the same kernels on the same
memory, hence the same bits. docs/benchmarks.md has what a prototype took on an H100.
"""

import logging
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Each = Callable[..., Iterable[Any]]
Network = Callable[[Tensor], Tensor]

Recorded = TypeVar("Recorded")

WARM_UP = 3  # passes before one is recorded: libraries choose their algorithms in the first


class Passes:
    """Passes of slices through a network, kernel by kernel.

    Args:
        network: Images to features.
        fast: The same, compiled for the shapes that come often; None: as it is.
        batch: Images of a batch that nobody differentiates, of those that come often.
    """

    def __init__(self, network: nn.Module, fast: Network | None = None, batch: int = 0):
        self.network, self.fast, self.batch = network, network if fast is None else fast, batch
        self.outputs: list[Tensor] = []

    def forward(self, slices: Sequence[Tensor], each: Each) -> list[Tensor]:
        """Return the features of each slice, without history, which last until the next call; `backward` may follow.

        Args:
            slices: Images (b, 3, S, S), of one shape.
            each: A function like map, which may use several threads.
        """
        self.outputs = list(each(self.fast, slices))
        return [output.detach() for output in self.outputs]

    def backward(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], each: Each) -> list[Tensor]:
        """Return the gradient of the parameters, flat, for each slice of the last `forward`; it lasts until the next.

        Args:
            gradients: (b, F), of the features of each slice.
            parameters: The trained parameters of the network; the same ones every time.
            each: A function like map, which may use several threads.
        """

        def through(output: Tensor, gradient: Tensor) -> Tensor:
            return flat_gradient(output, parameters, gradient.to(output.dtype))

        outputs, self.outputs = self.outputs, []
        return list(each(through, outputs, gradients))

    def infer(self, x: Tensor) -> Tensor:
        """Return features of images that nobody differentiates."""
        return (self.fast if len(x) == self.batch else self.network)(x)


def flat_gradient(output: Tensor, parameters: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """Return the gradient of parameters joined to one dimension, given that of an output."""
    return flat(torch.autograd.grad(output, parameters, gradient, materialize_grads=True))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors of any shapes in one of one dimension."""
    return torch.cat([tensor.flatten() for tensor in tensors])


class Recording(NamedTuple):
    """A function that was recorded.

    Attributes:
        replay: Does once more what the function did, on the memory that it had.
        output: What it returned; each replay overwrites it.
    """

    replay: Callable[[], object]
    output: Tensor


Record = Callable[[Callable[[], Tensor]], Recording]


class GraphRecorder:
    """Records functions as CUDA graphs in one pool of memory, so that they are to be replayed as they were recorded.

    Args:
        generators: On the GPU, that the functions draw from, beside its default one. A replay draws what the function
            would draw then.
    """

    def __init__(self, generators: Sequence[torch.Generator] = ()) -> None:
        self.pool: Any = None
        self.generators = generators

    def __call__(self, function: Callable[[], Tensor]) -> Recording:
        """Record a function that reads and writes tensors of fixed places. RuntimeError: it waits for the device."""
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        # Other threads, which load data or watch the group, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = function()
        self.pool = graph.pool()
        return Recording(graph.replay, output.detach())


def rerun(function: Callable[[], Tensor]) -> Recording:
    """Record nothing: a replay calls the function again. By it a machine without a GPU tests what graphs are for."""
    output = function().detach().clone()
    return Recording(lambda: output.copy_(function().detach()), output)


class RecordedCall:
    """A function of tensors that is called once and replayed from then on, on memory of its own.

    Args:
        function: Waits for nothing, and does the same at each call.
        inputs: Examples of what it is given; all others have their shapes and types.
        record: How it is recorded.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], record: Record):
        self.inputs = [x.clone() for x in inputs]
        warm_up(lambda: function(*self.inputs))
        self.recording = record(lambda: function(*self.inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return what the function returns for other inputs."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.recording.replay()
        return self.recording.output.clone()


def call(key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call a function of tensors, kernel by kernel. key: not used; see RecordedLoss."""
    return function(*inputs)


class RecordedLoss:
    """Calls the loss and its gradient, as one recording where they can be recorded, else kernel by kernel.

    Args:
        generators: All that the loss draws from.
        buffers: All that the loss writes to, such as the statistics of NAMR's structure head.
        tell: Called with one line where the loss cannot be recorded.
        record: How it is recorded; in memory that is not used between the forward and the backward passes.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        buffers: Sequence[Tensor],
        tell: Callable[[str], None],
        record: Record,
    ):
        self.generators, self.buffers, self.tell, self.record = generators, buffers, tell, record
        self.can_record = True
        self.key: Hashable = None
        self.recorded: RecordedCall | None = None

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return function(*inputs), which is recorded for each new key and shape. key: what it depends on beside."""
        key = key, *((x.shape, x.dtype) for x in inputs)
        if self.can_record and key != self.key:
            # A run that goes on records anew: what recording draws and writes must leave no trace.
            states = [generator.get_state() for generator in self.generators]
            values = [buffer.clone() for buffer in self.buffers]
            recorded = attempt("loss", lambda: RecordedCall(function, inputs, self.record), self.tell)
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)
            for buffer, value in zip(self.buffers, values, strict=True):
                buffer.copy_(value)
            self.key, self.recorded, self.can_record = key, recorded, recorded is not None
        return function(*inputs) if self.recorded is None else self.recorded(*inputs)


class RecordedSlice:
    """The passes of one slice, on memory of its own.

    Args:
        network: Images to features, in its precision.
        example: Images (b, 3, S, S) of the shape of all slices.
        parameters: The trained parameters of the network.
    """

    def __init__(self, network: Network, example: Tensor, parameters: Sequence[Tensor]):
        self.network, self.input, self.parameters = network, example.clone(), parameters
        self.output = self.gradient = torch.empty(0)

    def forward(self) -> Tensor:
        """Compute the output from the input."""
        self.output = self.network(self.input)
        return self.output

    def backward(self) -> Tensor:
        """Compute the gradient of the parameters from that of the output."""
        return flat_gradient(self.output, self.parameters, self.gradient)

    def record(self, record: Record) -> None:
        """Record the forward pass; the backward pass is recorded later, as it comes later."""
        self.replay_forward, self.features = record(self.forward)
        self.gradient = torch.empty_like(self.features)

    def record_backward(self, record: Record) -> None:
        """Record the backward pass. Slices are recorded, and replayed, from the last to the first."""
        self.replay_backward, self.flat = record(self.backward)


class RecordedPasses(Passes):
    """Passes that are recorded once and replayed, where the network can be recorded; else kernel by kernel.

    Args:
        network, fast, batch: As of Passes.
        autocast: Returns the context of its precision.
        parameters: Its trained parameters; none: it is frozen.
        tell: Called with one line where the network cannot be recorded.
        record: How passes are recorded.
    """

    def __init__(
        self,
        network: nn.Module,
        fast: Network | None,
        batch: int,
        autocast: Callable[..., torch.autocast],
        parameters: Sequence[Tensor],
        tell: Callable[[str], None],
        record: Record,
    ):
        super().__init__(network, fast, batch)
        self.autocast, self.parameters, self.tell, self.record = autocast, parameters, tell, record
        self.can_record, self.slices = True, list[RecordedSlice]()
        self.key: tuple[Any, ...] = ()
        self.inference: RecordedCall | None = None

    def forward(self, slices: Sequence[Tensor], each: Each) -> list[Tensor]:
        key = len(slices), slices[0].shape, slices[0].dtype
        if self.can_record and key != self.key:
            self.key = key
            self.slices = self._attempt(lambda: self._record_slices(slices)) or []
        if not self.slices:
            return super().forward(slices, each)
        for recorded, images in zip(self.slices, slices, strict=True):
            recorded.input.copy_(images)
            recorded.replay_forward()
        return [recorded.features for recorded in self.slices]

    def backward(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], each: Each) -> list[Tensor]:
        if not self.slices:
            return super().backward(gradients, parameters, each)
        for recorded, gradient in zip(reversed(self.slices), reversed(gradients), strict=True):
            recorded.gradient.copy_(gradient)
            recorded.replay_backward()
        return [recorded.flat for recorded in self.slices]

    def infer(self, x: Tensor) -> Tensor:
        if self.can_record and self.inference is None and len(x) == self.batch:
            self.inference = self._attempt(lambda: self._record_inference(x))
        if self.inference is None or self.inference.inputs[0].shape != x.shape:
            return super().infer(x)
        return self.inference(x)

    def _in_precision(self, x: Tensor) -> Tensor:
        # Weights that were rounded outside of the recording would not follow those that are trained.
        with self.autocast(cache_enabled=False):
            return self.fast(x)

    def _record_slices(self, slices: Sequence[Tensor]) -> list[RecordedSlice]:
        recorded = [RecordedSlice(self._in_precision, images, self.parameters) for images in slices]

        def both(one: RecordedSlice) -> None:
            one.gradient = torch.zeros_like(one.forward())
            one.backward()

        warm_up(lambda: both(recorded[0]))
        for one in recorded:
            one.record(self.record)
        for one in reversed(recorded):
            one.record_backward(self.record)
        return recorded

    def _record_inference(self, x: Tensor) -> RecordedCall:
        with torch.inference_mode(False), torch.no_grad():
            return RecordedCall(self._in_precision, [x], self.record)

    def _attempt(self, record: Callable[[], Recorded]) -> Recorded | None:
        """Return what was recorded; None, once and for all, where the network cannot be."""
        recorded = attempt("network", record, self.tell)
        self.can_record = recorded is not None
        return recorded


def attempt(what: str, record: Callable[[], Recorded], tell: Callable[[str], None]) -> Recorded | None:
    """Return what was recorded; None where that cannot be, which is told in one line."""
    try:
        return record()
    except RuntimeError as error:
        logging.getLogger(__name__).exception("the %s cannot be recorded as a CUDA graph", what)
        reason = str(error).strip().partition("\n")[0]
        tell(f"the {what} runs kernel by kernel: it cannot be a CUDA graph ({reason})")
        return None


def warm_up(task: Callable[[], object]) -> None:
    """Call a task a few times, on a GPU beside the usual stream, as the recording does.

    Raises:
        RuntimeError: The task waits for the GPU, which a recording would not survive.
    """
    if not torch.cuda.is_available():
        task()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP - 1):
            task()
        with waits_refused():
            task()
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def waits_refused() -> Iterator[None]:
    """Have operators that wait for the GPU raise RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
