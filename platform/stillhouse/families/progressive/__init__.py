"""Distillation of encoders in stages that change one thing at a time: teacher, data or loss.

The stages are the recipe's; each is a `fit` with this family. A loss method is a function
`(student: EncoderOutput, signal: EncoderOutput | None, batch: EncoderBatch, *, …) -> LossTerms`
whose total is a mean over the texts of the batch; the signal's layers carry the student's numbers.
"""
