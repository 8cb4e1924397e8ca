"""The only place that imports MLflow: its store, its runs, its models, and the thread that sends a run's metrics.

Knows nothing of configs, learners or Ray.
"""
