"""Stillhouse: small fast models from large slow ones, every method a short file beside a recipe."""

__version__ = "0.1.0"
