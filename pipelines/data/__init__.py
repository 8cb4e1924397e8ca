"""From a set's name to batches: load and split it, check its pictures, decode them or read cached features.

Part of a worker: of `cluster` only `worker`, `progress` and `transfer` are imported here.
"""
