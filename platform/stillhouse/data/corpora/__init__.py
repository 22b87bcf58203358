"""Corpora: functions that return a `Corpus`, named by a data node's `corpus._target_`."""
