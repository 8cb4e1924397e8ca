"""The driver's log of a run: tracebacks of what went wrong without ending the run."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

LOGGERS = (logging.getLogger("pipelines"), logging.getLogger("dml_core"))


@contextlib.contextmanager
def logged_to(folder: Path) -> Iterator[Path]:
    """Write what our modules log to FOLDER/driver.log for the time of the block; yield its path.

    The file is made by the first message.
    """
    path = folder / "driver.log"
    handler = _LazyFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = [(logger, logger.propagate, logger.level) for logger in LOGGERS]
    for logger in LOGGERS:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # the terminal gets a line of ours instead
    try:
        yield path
    finally:
        for logger, propagates, level in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagates
        handler.close()


class _LazyFile(logging.FileHandler):
    """A log file whose folder, too, is made by the first message."""

    def __init__(self, path: Path):
        super().__init__(path, delay=True)

    def emit(self, record: logging.LogRecord) -> None:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        super().emit(record)
