"""The stage that turns a GGUF file into an ordinary `transformers` folder, once.

A GGUF file is slow to load and cannot be saved again; the folder loads in a moment. Its weights are
the file's, de-quantised to float32: of a 4-bit file they are 4-bit weights in a wider type, not the
ones that were trained.
"""

import importlib.util
import io
import math
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from stillhouse.data.tokenizers import byte_level_bpe
from stillhouse.data.vocabulary import one_line
from stillhouse.errors import UserError, did_you_mean
from stillhouse.stages.stage import StageContext, StageResult

LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
# Of the synthetic tokenizer: SmolLM2's names, ids and form of a turn.
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class ConvertGguf:
    """Hand on a Llama-shaped model with its tokenizer, and the licence files beside it.

    Attributes:
        package_path: folder that holds the file.
        file: the GGUF file, relative to `package_path`.
        architecture: arguments of `transformers.LlamaConfig`; they must agree with the file.
        seed: of the random weights, with `synthetic`.
        synthetic: read no file; make a model of that architecture with random weights, and a
            tokenizer of bytes with a chat template.
    """

    package_path: str
    file: str
    architecture: dict[str, Any]
    seed: int = 0
    synthetic: bool = False

    def __call__(self, context: StageContext) -> StageResult:
        """Convert, save, and compare what was saved with what was read."""
        key = f"stages.{context.name}"
        known = LlamaConfig().to_dict()
        for name in self.architecture:
            if name not in known:
                raise UserError(
                    f"{key}.architecture.{name}: LlamaConfig has no such argument"
                    f"{did_you_mean(name, known)}"
                )
        if self.synthetic:
            tokenizer = byte_tokenizer(self.architecture.get("vocab_size", 0), key)
            model = self._random_model(tokenizer)
        else:
            path = self._find(key)
            with context.console.status(f"{context.name}: {path.name}"):
                model, tokenizer = self._read(path, key)
            for licence in sorted(Path(self.package_path).rglob("*")):
                if licence.is_file() and licence.name.upper().startswith(LICENCES):
                    shutil.copyfile(licence, context.output / licence.name)
        model.save_pretrained(context.output)
        tokenizer.save_pretrained(context.output)
        check_reloads(context.output, model, tokenizer, key)
        return StageResult(
            metrics={"parameters": model.num_parameters(), "vocab_size": len(tokenizer)}
        )

    def _random_model(self, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
        torch.manual_seed(self.seed)
        config: dict[str, Any] = self.architecture | {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return LlamaForCausalLM(LlamaConfig(**config)).eval()

    def _find(self, key: str) -> Path:
        """Return the file, once it is known that it can be read here."""
        missing = [n for n in ("gguf", "accelerate") if importlib.util.find_spec(n) is None]
        if missing:
            raise UserError(
                f"{key}: reading a GGUF file needs the package {' and '.join(missing)}; install "
                "with: pip install -e '.[gguf]'"
            )
        folder = Path(self.package_path)
        if not (folder / self.file).is_file():
            there = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.gguf"))
            raise UserError(
                f"{key}.file={self.file}: there is no such file in {folder}; its GGUF files are "
                f"{', '.join(there) or 'none'}{did_you_mean(self.file, there)}"
            )
        return folder / self.file

    def _read(self, path: Path, key: str) -> tuple[Any, PreTrainedTokenizerBase]:
        """Read model and tokenizer from a GGUF file, its weights as float32."""
        from transformers import GgufConfig

        place: dict[str, Any] = {"gguf_file": path.name}
        # The reader has a progress bar that transformers' own switch does not reach.
        with redirect_stderr(io.StringIO()):
            try:
                config = AutoConfig.from_pretrained(path.parent, **place)
                self._check_architecture(config, key)
                tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
                model = AutoModelForCausalLM.from_pretrained(
                    path.parent,
                    **place,
                    dtype=torch.float32,
                    # Without it, blocks stay quantised where there is a kernel for them.
                    quantization_config=GgufConfig(dequantize=True),
                )
            except UserError:
                raise
            except Exception as error:  # whatever a broken file makes the libraries raise
                raise UserError(
                    f"{key}.file={self.file}: cannot be read as GGUF: {one_line(error)}"
                ) from error
        if tokenizer.eos_token_id is None or len(tokenizer) > model.config.vocab_size:
            raise UserError(
                f"{key}.file={self.file}: its tokenizer has {len(tokenizer)} tokens, the end token "
                f"{tokenizer.eos_token}; expected an end token, and at most the model's "
                f"{model.config.vocab_size} tokens"
            )
        split_as_trained(tokenizer, path, f"{key}.file={self.file}")
        return model, tokenizer

    def _check_architecture(self, config: Any, key: str) -> None:
        """Refuse a file that is not what the recipe says of it."""
        if config.model_type != "llama":
            raise UserError(
                f"{key}.file={self.file}: a model of the type {config.model_type}; this stage "
                "reads those of the type llama"
            )
        for name, expected in self.architecture.items():
            found = getattr(config, name)
            # GGUF holds float32: 1e-5 comes back as 9.999999747e-06.
            close = isinstance(expected, float) and math.isclose(found, expected, rel_tol=1e-6)
            if found != expected and not close:
                raise UserError(
                    f"{key}.architecture.{name}={expected}: {Path(self.file).name} has {found}; "
                    f"set {key}.architecture.{name}={found}"
                )


def split_as_trained(tokenizer: Any, path: Path, where: str) -> None:
    """Give a byte-level tokenizer the splitting that its merges were learnt with.

    A GGUF file only names it. Where `transformers` does not know the name, it splits as GPT-2 does,
    which cuts a run of spaces before a digit otherwise than SmolLM was taught.

    Raises:
        UserError: for a name that is not known here either.
    """
    from gguf import GGUFReader
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    fields = GGUFReader(path).fields
    name = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else None
    if fields["tokenizer.ggml.model"].contents() != "gpt2" or name in GGUF_PRE_TOKENIZER_SPLITS:
        return
    if name == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif name != "gpt-2":
        known = ", ".join(sorted({"gpt-2", "smollm", *GGUF_PRE_TOKENIZER_SPLITS}))
        raise UserError(
            f"{where}: its tokenizer splits text as {name}, which is not known here; expected one "
            f"of {known}"
        )


def byte_tokenizer(vocab_size: int, key: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of bytes with chat tokens, filled up with reserved ones.

    Raises:
        UserError: when bytes and chat tokens do not fit.
    """
    spare = vocab_size - 256 - len(CHAT_TOKENS)
    if spare < 0:
        raise UserError(
            f"{key}.architecture.vocab_size={vocab_size}: expected at least "
            f"{256 + len(CHAT_TOKENS)}, 256 bytes and {len(CHAT_TOKENS)} chat tokens"
        )
    tokens = [*CHAT_TOKENS, *(f"<|reserved_{i}|>" for i in range(spare))]
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe([], vocab_size=vocab_size, special_tokens=tokens),
        unk_token=CHAT_TOKENS[0],
        bos_token=CHAT_TOKENS[1],
        eos_token=CHAT_TOKENS[2],
        pad_token=CHAT_TOKENS[2],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def check_reloads(folder: Path, model: Any, tokenizer: Any, key: str) -> None:
    """Refuse a folder that does not give back the model's logits and the tokenizer's tokens."""
    again: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    same_tokenizer = AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    ids = torch.arange(8).unsqueeze(0)
    ours, theirs = again(ids).logits, model(ids).logits
    # Where weights lie in memory decides the last bits of a product.
    if not same_tokenizer or (ours - theirs).norm() > 1e-5 * theirs.norm():
        raise UserError(
            f"{key}: the saved folder gives other logits or tokens than what was read; expected "
            "equal ones: a fault of this release of transformers, take the one in constraints.txt"
        )
