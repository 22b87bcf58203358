"""Files of one's own, as the tests of data write them."""

import json

from stillhouse.data.corpora.files import files

WAYS_IN = "expected a .txt, .jsonl or .parquet file, a folder of them, or a glob"
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def lines(*records: object) -> bytes:
    """Return records as the content of a `.jsonl`."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read(path: str, **changes):
    """Return the training documents of a path; the other parts are of no matter."""
    corpus = files(train_path=path, validation_path="held.txt", test_path="held.txt", **changes)
    assert corpus.documents("validation") == corpus.documents("test") == ["held out"]
    return corpus.documents("train")
