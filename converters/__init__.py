"""Weights to weights: a pretrained model's attention in another form."""

from .convert import FORMS, ROPES, convert
from .errors import InputError
from .maps import AttentionMaps
from .recipe import Conversion, LayerReport, Recipe

__all__ = [
    "FORMS",
    "ROPES",
    "AttentionMaps",
    "Conversion",
    "InputError",
    "LayerReport",
    "Recipe",
    "convert",
]
