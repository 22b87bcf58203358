"""A student whose layers share attention matrices, cut from a causal language model.

Hossein Rajabzadeh, Aref Jafari et al., "EchoAtt: Attend, Copy, then Adjust for More Efficient Large
Language Models", arXiv:2409.14595, Sec. 3.
"""

from typing import Any

from transformers import PreTrainedModel

from stillhouse.data.language import LanguageData
from stillhouse.data.vocabulary import check_same_tokenizer
from stillhouse.errors import UserError
from stillhouse.students.causal_lm import load_causal_lm
from stillhouse.students.modeling_shared_attention import MODELS, check_leaders
from stillhouse.students.sharing import Sharing, read_sharing

FAMILIES = {model.family.config_class.model_type: model for model in MODELS}


def shared_attention(
    data: LanguageData,
    *,
    path: str,
    sharing_path: str,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """Load a causal language model with every weight that a student needs, followers cut.

    Args:
        data: its tokenizer must be the model's own.
        path: model folder, or an id of the hub.
        sharing_path: folder of the choice of followers.
        dtype: torch dtype of the weights; `auto` keeps the stored one.
        attn_implementation: of the layers that share nothing, `sdpa` or `eager`.

    Raises:
        UserError: when no model lies there, its tokenizer is another one than the data's, there is
            no choice of followers, or it does not fit the model.
    """
    full = load_causal_lm(path, dtype=dtype, attn_implementation=attn_implementation, key="student")
    check_same_tokenizer(path, data.tokenizer, key="student")
    sharing = read_sharing(sharing_path, key="student.sharing_path")
    return share_attention(full, sharing, where=f"student.path={path}").train()


def share_attention(full: Any, sharing: Sharing, *, where: str) -> PreTrainedModel:
    """Return a model of the same weights whose followers have no query and key projections.

    Args:
        full: a model of a family of `modeling_shared_attention`; its tensors are not copied.
        sharing: who follows whom.
        where: the model, for messages.

    Raises:
        UserError: for a model of another family, another number of layers or attention dropout, and
            for layers of a group that do not see the same keys.
    """
    config = full.config
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{where}: a model of the type {config.model_type}; layers can share attention in "
            f"those of the type {', '.join(sorted(FAMILIES))}"
        )
    if config.num_hidden_layers != len(sharing.leaders):
        raise UserError(
            f"{where}: the model has {config.num_hidden_layers} layers, followers were chosen for "
            f"one of {len(sharing.leaders)}; choose them anew with force=sharing"
        )
    if config.attention_dropout:
        raise UserError(
            f"{where}: the model has attention_dropout={config.attention_dropout}; layers that "
            "share attention have none: set it to 0 in the model's config.json"
        )
    try:
        check_leaders(list(sharing.leaders), getattr(config, "layer_types", None))
    except ValueError as error:
        raise UserError(f"{where}: {error}; choose other followers") from error
    shared: Any = FAMILIES[config.model_type]
    settings = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "auto_map")}
    kept = {
        name: weight
        for name, weight in full.state_dict().items()
        if not any(f".layers.{f}.self_attn.{p}" in name for f in sharing.followers for p in "qk")
    }
    student, report = shared.from_pretrained(
        None,
        config=shared.config_class(**settings, attention_leaders=list(sharing.leaders)),
        state_dict=kept,
        dtype=full.dtype,
        attn_implementation=config._attn_implementation,
        output_loading_info=True,
    )
    assert not any(report.values()), report
    student.generation_config = full.generation_config
    return student
