"""Small random encoders of every family that can be read, their tokenizer, and fake data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ErnieConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from stillhouse.data.labelled.task import Task
from stillhouse.records.encoders import EncoderBatch

V, PAD, LAYERS, HEADS, WIDTH, POSITIONS = 23, 1, 3, 2, 16, 20
# Large weights: near 0 every attention is uniform and a padded position changes nothing.
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.4,
    "pad_token_id": PAD,
}
RELATIVE: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(**SHAPE),
    "ernie": ErnieConfig(**SHAPE, use_task_id=True),
    "roberta": RobertaConfig(**SHAPE, type_vocab_size=1),
    "xlm-roberta": XLMRobertaConfig(**SHAPE, type_vocab_size=1),
    "camembert": CamembertConfig(**SHAPE, type_vocab_size=1),
    "electra": ElectraConfig(**SHAPE, embedding_size=8),
    "distilbert": DistilBertConfig(
        vocab_size=V,
        dim=WIDTH,
        hidden_dim=24,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_position_embeddings=POSITIONS,
        initializer_range=0.4,
        pad_token_id=PAD,
    ),
    "deberta": DebertaConfig(**SHAPE, **RELATIVE),
    "deberta-v2": DebertaV2Config(
        **SHAPE, **RELATIVE, conv_kernel_size=3, position_biased_input=False
    ),
}
CLASSES = Task("classification", ("no", "yes"))


def make(family: str, task: Task | None = CLASSES, attention: str = "eager", seed: int = 0) -> Any:
    """Return a model in float64 and eval mode, its weights from a seed; biases are random too."""
    torch.manual_seed(seed)
    auto: Any = AutoModel if task is None else AutoModelForSequenceClassification
    config = CONFIGS[family].__class__.from_dict(CONFIGS[family].to_dict())
    if task is not None:
        config.id2label = dict(enumerate(task.names))
    model: Any = auto.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.2)
            elif "LayerNorm" in name or "layer_norm" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    return model.double().eval()


def make_batch(
    lengths: Sequence[int] = (7, 4, 9), seed: int = 0, labels: Any = None
) -> EncoderBatch:
    """Return random pairs of texts, padded on the right; the second one begins at the third."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor([[n] for n in lengths])
    ids = torch.randint(3, V, mask.shape, generator=generator).masked_fill(~mask, PAD)
    types = (torch.arange(longest) >= 2).long().expand(mask.shape)
    return EncoderBatch(ids, mask, types * mask, labels)


def make_tokenizer(size: int = V) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words w0, w1 …, of which the first four are special."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="w0",
        pad_token="w1",
        cls_token="w2",
        mask_token="w3",
    )


def save(model: Any, folder: Path) -> str:
    """Write a model with its tokenizer, and return where."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class FakeData:
    """What students, teachers and evaluators read of the data."""

    task: Task | None = CLASSES
    batches: Sequence[EncoderBatch] = field(default_factory=list)
    sequence_length: int = 16

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return make_tokenizer()

    def evaluation_batches(self, split: str) -> Iterator[EncoderBatch]:
        assert split == "test"
        return iter(self.batches)
