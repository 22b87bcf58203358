"""Families: the order of a training step, one package each; a method is one file in its family."""
