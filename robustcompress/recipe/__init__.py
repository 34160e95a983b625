"""Runs as YAML: one file says everything that a run depends on, and nothing in it can name code to call."""

from robustcompress.recipe.plain import merged, parse_yaml, read_yaml
from robustcompress.recipe.reading import Evaluation
from robustcompress.recipe.run import RunRecipe

__all__ = ["Evaluation", "RunRecipe", "merged", "parse_yaml", "read_yaml"]
