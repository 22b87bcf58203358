"""Metrics and evaluators: pure functions over models and data."""
