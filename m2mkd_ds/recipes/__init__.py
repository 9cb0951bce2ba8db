"""Recipes: a run is a documented function that returns a RunConfig. `m2mkd recipes` lists them, `m2mkd recipes NAME` prints one.

To add one, write a function whose docstring gives command, hardware, hours and expected score, and name it in RECIPES.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from m2mkd_ds.config import ConfigError, RunConfig
from m2mkd_ds.recipes.fashion import fashion, fashion_pretrained
from m2mkd_ds.recipes.imagenet import vmoe_base_from_timm, vmoe_base_in1k
from m2mkd_ds.recipes.tiny import tiny, tiny_pretrained

RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe for recipe in (tiny, tiny_pretrained, fashion, fashion_pretrained, vmoe_base_in1k, vmoe_base_from_timm)
}


def get_recipe(name: str) -> RunConfig:
    """The config of a recipe. Raises ConfigError with the nearest name."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"no recipe {name!r}; there are {', '.join(RECIPES)}{hint}")
    return RECIPES[name]()
