"""Losses as pure functions of tensors and records; argument order is (student, teacher)."""
