from types import SimpleNamespace

import pytest
from chats import CHATML, END, WITH_SYSTEM, bracketed, chat, chat_tokenizer, marked

from stillhouse.data.conversations import conversation_as_tokens
from stillhouse.data.documents import Conversation
from stillhouse.data.encoding import encode
from stillhouse.data.windows import TokenWindows, collate_windows
from stillhouse.errors import UserError

TWO_TURNS = (
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[yes<|im_end|>]\n"
    "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n[so  it is<|im_end|>]\n"
)
QUESTIONS = chat("hi", "yes", "why", "so  it is")
# Marks as authors set them: with the end token, without it, and with the white space behind it.
MARKS = {
    "whole": "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\\n' }}",
    "without end": "{%- generation -%}{{ message['content'] }}{%- endgeneration -%}"
    "{{ '<|im_end|>\\n' }}",
    "with space": "{% generation %}{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}",
}


def learned_text(conversation, tokenizer) -> str:
    return bracketed(conversation_as_tokens(conversation, tokenizer), tokenizer)


def test_only_answers_and_the_tokens_that_close_them_are_learnt():
    tokenizer = chat_tokenizer(CHATML)
    assert learned_text(QUESTIONS, tokenizer) == TWO_TURNS
    document = conversation_as_tokens(QUESTIONS, tokenizer)
    assert document.follows_end is False
    assert document.learned[0] is False
    assert document.tokens == tokenizer(TWO_TURNS.replace("[", "").replace("]", ""))["input_ids"]


@pytest.mark.parametrize("template", [CHATML, WITH_SYSTEM], ids=["plain", "with default"])
def test_a_system_turn_is_not_learnt_its_own_or_the_templates(template):
    told = "<|im_start|>system\nBe brief.<|im_end|>\n" + TWO_TURNS
    tokenizer = chat_tokenizer(template)
    asked = chat("hi", "yes", "why", "so  it is", system="Be brief.")
    assert learned_text(asked, tokenizer) == told
    default = "<|im_start|>system\nBe kind.<|im_end|>\n" if template == WITH_SYSTEM else ""
    assert learned_text(QUESTIONS, tokenizer) == default + TWO_TURNS


@pytest.mark.parametrize("answer", MARKS.values(), ids=MARKS)
def test_marks_of_a_template_teach_the_same_end_token_included(answer):
    assert learned_text(QUESTIONS, chat_tokenizer(marked(answer))) == TWO_TURNS


def test_marks_are_those_of_the_librarys_mask():
    tokenizer = chat_tokenizer(marked(MARKS["whole"]), ("why so it is", "yes " * 9))
    theirs = tokenizer.apply_chat_template(
        list(QUESTIONS.messages), return_dict=True, return_assistant_tokens_mask=True
    )
    ours = conversation_as_tokens(QUESTIONS, tokenizer)
    assert list(ours.tokens) == theirs["input_ids"]
    assert [int(x) for x in ours.learned] == theirs["assistant_masks"]
    assert sum(ours.learned) > 4


@pytest.mark.parametrize("template", [CHATML, *map(marked, MARKS.values())], ids=["none", *MARKS])
@pytest.mark.parametrize("answer", ["é🦄", "🦄", " a ", "\n\nb", "c\n", "<|im_start|>"])
def test_every_byte_of_an_answer_is_learnt(template, answer):
    tokenizer = chat_tokenizer(template)
    expected = f"<|im_start|>user\n🦄<|im_end|>\n<|im_start|>assistant\n[{answer}<|im_end|>]\n"
    assert learned_text(chat("🦄", answer), tokenizer) == expected


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_white_space_that_a_tokenizer_leaves_out_of_its_offsets(trim_offsets):
    """Trimmed, the space behind the role has no characters and lies where the answer begins."""
    spaced = CHATML.replace("\\n' }}", " ' }}")
    tokenizer = chat_tokenizer(spaced, ("so it is",) * 3, trim_offsets=trim_offsets)
    prompt = "<|im_start|>user hi<|im_end|> <|im_start|>assistant "
    encoded = tokenizer(prompt + "\nso", add_special_tokens=False, return_offsets_mapping=True)
    space = (len(prompt) - (not trim_offsets), len(prompt))
    assert space in encoded["offset_mapping"]
    assert learned_text(chat("hi", "\nso  it is "), tokenizer) == (
        f"{prompt}[\nso  it is <|im_end|>] "
    )


def test_a_token_that_begins_in_the_header_is_the_headers():
    tokenizer = chat_tokenizer(CHATML, ("\n\n\n",) * 3)
    assert tokenizer.tokenize("\n\n") == ["ĊĊ"]
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n\n[\nyes<|im_end|>]\n"
    assert learned_text(chat("hi", "\n\nyes"), tokenizer) == expected


def test_an_end_token_that_pads_too_is_learnt_where_it_ends_an_answer_and_nowhere_else():
    tokenizer = chat_tokenizer(CHATML)
    end = tokenizer.eos_token_id
    assert end == tokenizer.pad_token_id
    documents = encode([chat("hi", "yes"), chat("a", "b", "c", "longer")], tokenizer, end)
    windows = TokenWindows(documents, length=64, end_token=end, packing=False).in_order()
    batch = collate_windows(windows, pad_token=end)
    rows = zip(batch.labels, batch.mask, strict=True)
    assert [tokenizer.decode(r[m]) for r, m in rows] == [f"yes{END}", f"b{END}longer{END}"]
    assert int((batch.labels[~batch.mask] == end).sum()) > 3, "ends of questions, and padding"


def test_the_first_token_of_all_is_not_learnt():
    """No token stands before it from which it could be predicted."""
    bare = (
        "{% for m in messages %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    )
    tokenizer = chat_tokenizer(bare + "{% endfor %}")
    greeting = Conversation([{"role": "assistant", "content": "yes"}], "chats.jsonl, line 7")
    assert learned_text(greeting, tokenizer) == "y[es<|im_end|>]"


def test_texts_and_conversations_keep_their_order():
    tokenizer = chat_tokenizer(CHATML)
    documents = encode(["one", QUESTIONS, "two"], tokenizer, tokenizer.eos_token_id)
    assert [d.follows_end for d in documents] == [True, False, True]
    assert bracketed(documents[0], tokenizer) == f"[one{END}]"
    assert bracketed(documents[1], tokenizer) == TWO_TURNS
    assert bracketed(documents[2], tokenizer) == f"[two{END}]"


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("length", [5, 16, 33, 400])
def test_every_learnt_token_is_predicted_exactly_once(packing, length):
    tokenizer = chat_tokenizer(CHATML)
    end = tokenizer.eos_token_id
    mixed = [QUESTIONS, "a text", chat("long question " * 3, "no"), chat("q", "long answer " * 5)]
    documents = encode([*mixed, *mixed[::-1]], tokenizer, end)
    windows = TokenWindows(documents, length=length, end_token=end, packing=packing).in_order()
    learned = [t for d in documents for t, yes in zip(d.tokens, d.learned, strict=True) if yes]
    assert [int(t) for w in windows for t in w.labels[w.learned]] == learned
    assert all(len(w.labels) <= length and w.learned.any() for w in windows)


# A template that drops what was thought before the last question, as those of reasoning models do.
FORGETFUL = (
    "{% for message in messages %}" + "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
) + CHATML


def named(template, path="some/model"):
    tokenizer = chat_tokenizer(template)
    tokenizer.name_or_path = path
    return tokenizer


@pytest.mark.parametrize(
    ("conversation", "tokenizer", "line"),
    [
        (
            QUESTIONS,
            named(None),
            "data.tokenizer_path=some/model: the tokenizer has no chat template, which chats.jsonl,"
            " line 7 needs; name a tokenizer with one, or give records with a text",
        ),
        (
            QUESTIONS,
            SimpleNamespace(is_fast=False, name_or_path="some/model"),
            "data.tokenizer_path=some/model: the tokenizer gives no offsets, by which the answers "
            "in chats.jsonl, line 7 are found; name one with a tokenizer.json",
        ),
        (
            chat("hi"),
            named(CHATML),
            "chats.jsonl, line 7: no message has the role 'assistant'; expected an answer to "
            "learn; add one, or drop the record",
        ),
        (
            QUESTIONS,
            named(FORGETFUL),
            "chats.jsonl, line 7: the chat template of data.tokenizer_path=some/model rewrites "
            "earlier turns, so that the answer in message 2 cannot be told from them; mark answers "
            "in the template with {% generation %}, or give each answer a record of its own",
        ),
        (
            chat("hi", "yes"),
            named(CHATML.replace("assistant\\n", "assistant\\n<think>")),
            "chats.jsonl, line 7: the chat template of data.tokenizer_path=some/model begins the "
            "answer in message 2 otherwise than its generation prompt, so that it cannot be told "
            "from it; mark answers in the template with {% generation %}",
        ),
        (
            Conversation(QUESTIONS.messages[1:], "chats.jsonl, line 7"),
            named(CHATML),
            "chats.jsonl, line 7: the first message is the assistant's; expected a message before "
            "it, to which it answers; add one, or drop it",
        ),
        (
            chat("hi", "yes", system="Be brief."),
            named(STRICT),
            "chats.jsonl, line 7: the chat template of data.tokenizer_path=some/model refuses the "
            "conversation: no system role; mend the record, or name a tokenizer whose template "
            "takes it",
        ),
    ],
    ids=[
        "no template",
        "slow",
        "no answer",
        "rewrites",
        "prompts with more",
        "answer first",
        "refuses",
    ],
)
def test_one_line_says_what_stands_in_the_way(conversation, tokenizer, line):
    with pytest.raises(UserError) as caught:
        conversation_as_tokens(conversation, tokenizer)
    assert str(caught.value) == line


def test_a_template_that_rewrites_earlier_turns_takes_single_ones():
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    expected += "[<think></think>yes<|im_end|>]\n"
    assert learned_text(chat("hi", "yes"), named(FORGETFUL)) == expected
