"""Distillation of students whose layers share attention matrices.

The order of steps is that of `families.sequence.module.SequenceDistiller`; this family has no
module of its own. Its `layers`, and those of the teacher, are the hidden states that a method
compares. A loss method is a function
`(student: LanguageOutput, signal: LanguageSignal, batch: SequenceBatch, *, …) -> LossTerms`
whose total is a mean over `batch.mask`.
"""
