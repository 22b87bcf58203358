"""A small tokenizer with a chat template, and documents with what is learnt of them in brackets."""

from itertools import groupby

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stillhouse.data.documents import Conversation, TokenDocument

END = "<|im_end|>"
HEADER = "{{ '<|im_start|>' + message['role'] + '\\n' }}"
BODY = "{{ message['content'] + '<|im_end|>\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = "{% for message in messages %}" + HEADER + BODY + "{% endfor %}" + PROMPT
# As SmolLM2: a system turn of its own where the conversation has none.
WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}"
    "{% endif %}"
) + CHATML


def marked(answer: str) -> str:
    """Return ChatML in which the assistant's part is `answer`."""
    body = "{% if message['role'] == 'assistant' %}" + answer + "{% else %}" + BODY + "{% endif %}"
    return "{% for message in messages %}" + HEADER + body + "{% endfor %}" + PROMPT


def chat_tokenizer(
    template: str | None, texts: tuple[str, ...] = (), *, trim_offsets: bool | None = None
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes and the merges of `texts`; its end token pads too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trim_offsets is not None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END, "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast


def chat(*contents: str, system: str | None = None) -> Conversation:
    """Return a conversation in which user and assistant take turns."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    first = [] if system is None else [{"role": "system", "content": system}]
    return Conversation([*first, *messages], "chats.jsonl, line 7")


def bracketed(document: TokenDocument, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the text of a document, what is learnt in brackets."""
    text = ""
    pairs = zip(document.tokens, document.learned, strict=True)
    for learned, run in groupby(pairs, key=lambda pair: pair[1]):
        part = tokenizer.decode([token for token, _ in run])
        text += f"[{part}]" if learned else part
    return text
