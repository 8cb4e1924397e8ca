"""What the embedding loop is given."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pipelines.training.job import ModelJob

Part = Literal["given", "own", "test"]


@dataclass(frozen=True)
class EmbedJob(ModelJob):
    """Pictures to embed.

    Attributes:
        part: Which pictures: those that the config names, with or without labels ("given"), the run's whole set
            ("own"), or its test pictures ("test").
        out: The file, as an absolute path or URL, beside which each worker writes a part of it.
    """

    loop: ClassVar[str] = "pipelines.serving.embed:embed_loop"
    part: Part = "own"
    out: str = ""
