"""Weights to weights: a pretrained model's attention in another form."""

from .convert import FORMS, convert, plan
from .errors import InputError
from .gqa import POOLINGS
from .maps import AttentionMaps
from .recipe import Conversion, LayerReport, Recipe
from .targets import PRESETS, ROPES

__all__ = [
    "FORMS",
    "POOLINGS",
    "PRESETS",
    "ROPES",
    "AttentionMaps",
    "Conversion",
    "InputError",
    "LayerReport",
    "Recipe",
    "convert",
    "plan",
]
