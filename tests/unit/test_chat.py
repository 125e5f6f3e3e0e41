"""llmjax.data.chat: tokens, loss mask, prefix property, injection."""

import random

import pytest

from llmjax.data.chat import DEFAULT_TEMPLATE, ROLES, encode_chat
from llmjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerConfig
from llmjax.errors import UserError

DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["Hello, see you. Be kind. <|end|> <|user|>"] * 20, TokenizerConfig(vocab_size=300))


def with_template(tokenizer, template):
    return Tokenizer(tokenizer._serialized, template)


def random_dialogue(rng):
    words = ["hi", " ", "", "\n", "  you", "😀", "\x00", *SPECIAL_TOKENS, "{{ 1 }}", "{% if %}", "é"]
    text = lambda: "".join(rng.choices(words, k=rng.randrange(6)))  # noqa: E731
    roles = rng.choices(["user", "assistant"], k=rng.randrange(1, 6))
    roles = (["system"] if rng.random() < 0.5 else []) + roles
    return [{"role": role, "content": text()} for role in roles]


def spans(mask):
    """(start, stop) of each run of ones."""
    edges = [i for i in range(len(mask) + 1) if (mask[i - 1] if i else 0) != (mask[i] if i < len(mask) else 0)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_tokens_and_mask_of_a_dialogue(tokenizer):
    tokens, mask = encode_chat(tokenizer, DIALOGUE)
    e, t = tokenizer.encode, tokenizer
    system_id, user_id, assistant_id = (t.encode_template(name)[0] for name in ("<|system|>", "<|user|>", "<|assistant|>"))
    expected = [([t.endoftext_id, system_id], 0), (e("Be kind."), 0), ([t.end_id], 0)]
    for user, assistant in (("Hi", "Hello!"), ("Bye", "See you.")):
        expected += [([user_id], 0), (e(user), 0), ([t.end_id, assistant_id], 0)]
        expected += [(e(assistant), 1), ([t.end_id], 1)]
    assert tokens == [i for ids, _ in expected for i in ids]
    assert mask == [m for ids, m in expected for _ in ids]


def test_prefix_property_over_random_dialogues(tokenizer):
    rng = random.Random(0)
    for _ in range(100):
        messages = random_dialogue(rng)
        whole, mask = encode_chat(tokenizer, messages)
        assert len(whole) == len(mask)
        for k in range(1, len(messages)):
            head = encode_chat(tokenizer, messages[:k])
            assert whole[: len(head.tokens)] == head.tokens
            assert mask[: len(head.tokens)] == head.loss_mask
            prompt = encode_chat(tokenizer, messages[:k], add_generation_prompt=True)
            assert len(prompt.tokens) > len(head.tokens)
            if messages[k]["role"] == "assistant":
                assert whole[: len(prompt.tokens)] == prompt.tokens
                assert mask[len(prompt.tokens)] == 1 and not any(mask[len(head.tokens) : len(prompt.tokens)])


def test_every_assistant_span_is_its_text_and_its_end(tokenizer):
    rng = random.Random(1)
    for _ in range(100):
        messages = random_dialogue(rng)
        tokens, mask = encode_chat(tokenizer, messages)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        found = [tokens[start:stop] for start, stop in spans(mask)]
        assert [span[-1] for span in found] == [tokenizer.end_id] * len(answers)
        assert [tokenizer.decode(span[:-1]) for span in found] == answers


def test_control_tokens_cannot_be_injected(tokenizer):
    """However the texts read, the control tokens are those of the same dialogue with harmless texts."""
    rng = random.Random(2)
    for _ in range(100):
        messages = random_dialogue(rng)
        harmless = [message | {"content": "x"} for message in messages]
        controls = lambda m: [i for i in encode_chat(tokenizer, m).tokens if i in tokenizer.special_ids]  # noqa: E731
        assert controls(messages) == controls(harmless)


def test_pieces_that_meet_do_not_join_into_a_control_token(tokenizer):
    template = "{% for m in messages %}<|{{ m.content }}|>{% endfor %}{{ messages[0].content }}<|end|>"
    tokens = encode_chat(with_template(tokenizer, template), [{"role": "user", "content": "end"}]).tokens
    assert tokens.count(tokenizer.end_id) == 1


@pytest.mark.parametrize("part", ["[1:-1]", ".splitlines()[1]", ".split('#')[1]"])
def test_a_template_that_takes_apart_a_message_with_a_control_token_is_refused(tokenizer, part):
    template = "{% for m in messages %}<|user|>{{ m.content" + part + " }}<|end|>{% endfor %}"
    with pytest.raises(UserError, match="chat template"):
        encode_chat(with_template(tokenizer, template), [{"role": "user", "content": "#\nx<|end|>y\n#"}])


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "no message"),
        ([{"role": "asistant", "content": "x"}], "message 1: unknown role 'asistant'; did you mean 'assistant'"),
        ([{"role": "user", "content": "x"}, {"role": "<|end|>", "content": "x"}], "message 2: unknown role"),
        ([{"role": "user", "content": None}], "content=None is not text"),
        ([{"content": "x"}], "role=None is not text"),
        ([{"role": "user", "content": "x", "name": "<|end|>"}], "unknown field 'name'"),
        ([{"role": "user", "content": "a\U000f5a31b"}], "reserved private-use character"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}], "message can only be the first"),
    ],
)
def test_bad_dialogues(tokenizer, messages, error):
    with pytest.raises(UserError, match=error) as caught:
        encode_chat(tokenizer, messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("a\n{% if %}", "chat template line 2"),
        ("{{ nothing.there }}", "chat template: 'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ 1 + 'a' }}", "chat template: unsupported operand"),
        ("{% for m in messages %}{{ m.content[:-1] }}{% endfor %}", "takes a message's text apart"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no control token ends the assistant's turn"),
    ],
)
def test_bad_templates(tokenizer, template, error):
    with pytest.raises(UserError, match=error):
        encode_chat(with_template(tokenizer, template), DIALOGUE)


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_without_generation_blocks_the_mask_comes_from_the_prefixes(tokenizer):
    dialogue = [*DIALOGUE[:2], {"role": "assistant", "content": "  Hello!\n"}, *DIALOGUE[3:]]
    tokens, mask = encode_chat(with_template(tokenizer, CHATML), dialogue)
    said = [tokenizer.decode([t for t, m in zip(tokens[a:b], mask[a:b]) if m]) for a, b in spans(mask)]
    assert said == ["Hello!<|end|>", "See you.<|end|>"]
    forged = [{"role": "user", "content": "<|end|>"}, {"role": "assistant", "content": "<|end|>"}]
    tokens, mask = encode_chat(with_template(tokenizer, CHATML), forged)
    assert tokens.count(tokenizer.end_id) == 2 and sum(mask) == len(tokenizer.encode("<|end|>")) + 1


def test_a_template_that_breaks_the_prefix_property_is_refused(tokenizer):
    breaks = "{{ messages | length }}" + CHATML  # what is written first changes with every turn
    with pytest.raises(UserError, match="is not the beginning of what it makes of the dialogue"):
        encode_chat(with_template(tokenizer, breaks), DIALOGUE)


def test_tojson_keeps_angle_brackets(tokenizer):
    template = "{{ {'a': '<|end|>é'} | tojson }}"
    tokens = encode_chat(with_template(tokenizer, template), DIALOGUE[:1]).tokens
    assert tokenizer.decode(tokens) == '{"a": "<|end|>é"}'


def test_agrees_with_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    result = theirs.apply_chat_template(DIALOGUE, return_dict=True, return_assistant_tokens_mask=True)
    tokens, mask = encode_chat(tokenizer, DIALOGUE)
    assert list(result["input_ids"]) == tokens
    assert list(result["assistant_masks"]) == mask
    prompt = theirs.apply_chat_template(DIALOGUE[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(prompt) == encode_chat(tokenizer, DIALOGUE[:2], add_generation_prompt=True).tokens


def test_roles_are_those_of_the_template(tokenizer):
    assert all(f'"{role}"' in DEFAULT_TEMPLATE and f"<|{role}|>" in SPECIAL_TOKENS for role in ROLES)
