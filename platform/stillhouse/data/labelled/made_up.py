"""Random words with labels of a task's kind, in place of a package or of the hub."""

from stillhouse.data.corpora.made_up import COUNT, random_texts
from stillhouse.data.labelled.task import Example, Label, LabelledText, Task, held_out_by_content


def made_up(name: str, task: Task, *, pairs: bool = False) -> LabelledText:
    """Make examples that need nothing fetched; what a label says has no ground in its text.

    Args:
        name: of the set in whose place they stand.
        task: what the labels say.
        pairs: whether an example is a pair of texts.
    """
    texts = random_texts()
    examples = [
        Example(next(texts), next(texts) if pairs else None, _label(task, number))
        for number in range(COUNT)
    ]
    splits = held_out_by_content(examples, {}, source=name)
    return LabelledText(f"random words in place of {name}", "public domain", task, splits)


def _label(task: Task, number: int) -> Label:
    index = number % task.num_labels
    if task.kind == "classification":
        return index
    return float(number % 5) if task.kind == "regression" else (index,)
