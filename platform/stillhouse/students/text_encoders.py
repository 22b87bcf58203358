"""What reads captions: an encoder of `transformers`, of its own or in a pipeline of diffusers."""

from typing import Any

import transformers
from transformers import AutoConfig, AutoModel

from stillhouse.students.causal_lm import loading


def load_text_encoder(
    path: str, *, subfolder: str | None = None, revision: str | None = None, key: str
) -> Any:
    """Load an encoder without a head, in float32.

    Args:
        path: its folder, or an id of the hub.
        subfolder: of a whole pipeline's folder, such as `text_encoder`.
        revision: of the hub.
        key: where it stands in the config, for messages.

    Raises:
        UserError: for what is none.
    """
    where = f"{key}.path={path}" + (f", subfolder {subfolder}" if subfolder else "")
    version: dict[str, Any] = {"subfolder": subfolder or "", "revision": revision}
    with loading(where):
        config = AutoConfig.from_pretrained(path, **version)
        name = (config.architectures or [""])[0]
        # The half of T5 that reads is no model of its own to AutoModel.
        kind: Any = getattr(transformers, name) if name.endswith("EncoderModel") else AutoModel
        return kind.from_pretrained(path, dtype="float32", **version).eval()
