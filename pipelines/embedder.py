"""The loader module that registered MLflow models name: what it loads is in pipelines/models/embedder.py."""

from pipelines.models.embedder import _load_pyfunc

__all__ = ["_load_pyfunc"]
