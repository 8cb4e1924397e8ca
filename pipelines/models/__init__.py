"""A learner as files: build it from a config, write and read checkpoints, find them, embed pictures with one.

Part of a worker: no driver code, and nothing of a data set's files.
"""
