"""What every command has: where messages go, and one clear line with the exit code for each way to fail."""

from rich.console import Console

messages = Console(stderr=True, force_jupyter=False)  # plain lines in a notebook, too: no widgets


class RunFailed(Exception):
    """Workers failed on the way; the message is one line."""
