"""Configs: the schema of all keys, how recipes and key=value become one, and what identifies a run.

Imports nothing but pydantic and YAML.
"""

from pipelines.config.recipe import load_recipe as load
from pipelines.config.schema import Config

__all__ = ["Config", "load"]
