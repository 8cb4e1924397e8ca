"""Many runs: a search of settings by Ray Tune on validation classes, then tests of the winner and of the defaults.

The only wing that imports `ray.tune` or `tune_spaces`.
"""
