"""Training that brings a converted model's quality back, on transformers' Trainer and peft."""

from .config import HeldOut, UptrainConfig, Uptraining
from .distiller import Interrupted
from .run import FORMS, uptrain

__all__ = ["FORMS", "HeldOut", "Interrupted", "UptrainConfig", "Uptraining", "uptrain"]
