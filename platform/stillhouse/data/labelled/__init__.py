"""Texts with labels, by source."""
