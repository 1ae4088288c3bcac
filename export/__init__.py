"""Converted models for tools that do not know rehead."""

from .run import FORMATS, Export, export

__all__ = ["FORMATS", "Export", "export"]
