"""Search spaces of `dml tune`: base, and one for each method; SPACE maps config keys to domains of Ray Tune.

May not live here: anything else; these modules import ray.tune alone.
"""
