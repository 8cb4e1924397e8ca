"""Optuna's search in a sweep that may be killed."""

from typing import Any

from ray.tune.search.optuna import OptunaSearch


class NumberedOptuna(OptunaSearch):
    """Optuna's search by Ray Tune, which numbers the points that it draws.

    Ray Tune gives each trial a random id, and what it had not kept when it was killed it draws again: the same point by
    another id. By its number, which is kept with the state that draws it, the trial is known again and goes on.
    """

    drawn = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Draw a point; None: not now. Adds "number" to what Ray Tune hands the trial."""
        config: Any = super().suggest(trial_id)
        if isinstance(config, dict):
            config = {**config, "number": self.drawn}
            self.drawn += 1
        return config
