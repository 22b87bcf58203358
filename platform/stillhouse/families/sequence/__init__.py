"""Distillation of language models on given, teacher-made or student-made sequences.

A loss method of this family is a function
`(student: LanguageOutput, signal: LanguageOutput | None, batch: SequenceBatch, *, …) -> LossTerms`
whose total is a mean over `batch.mask`.
"""
