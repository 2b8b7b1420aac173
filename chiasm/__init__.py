"""Serve vision, video and audio language models as three services that scale on their own."""

__version__ = "0.1.0"
