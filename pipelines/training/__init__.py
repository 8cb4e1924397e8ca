"""In a worker: the training loop as a story, its set-up, one epoch, validation and test, the optimizer.

No driver code: of `cluster` only `worker`, `progress` and `transfer` are imported here.
"""
