"""Connectors: trainable modules that turn frozen encoder features into soft tokens of the LLM."""

from unimoe_model.connectors.audio import AudioConnector
from unimoe_model.connectors.image import ImageConnector
from unimoe_model.connectors.speech import SpeechConnector

__all__ = ["AudioConnector", "ImageConnector", "SpeechConnector"]
