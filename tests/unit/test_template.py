"""llmjax.data.template: tokens, loss mask, prefix property, injection."""

import datetime
import json
import random

import pytest

from llmjax.data.records import ROLES, Message
from llmjax.data.template import DEFAULT_TEMPLATE, encode_chat
from llmjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerConfig
from llmjax.errors import UserError
from llmjax.interop.hf_tokenizer import read_tokenizer


def messages_of(*turns):
    """Messages of "role: text"."""
    return tuple(Message(*turn.split(": ", 1)) for turn in turns)


DIALOGUE = messages_of("system: Be kind.", "user: Hi", "assistant: Hello!", "user: Bye", "assistant: See you.")


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
    return [Message(role, text()) for role in roles]


def spans(mask):
    """(start, stop) of each run of ones."""
    edges = [i for i in range(len(mask) + 1) if (mask[i - 1] if i else 0) != (mask[i] if i < len(mask) else 0)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_tokens_and_mask_of_a_dialogue(tokenizer):
    tokens, mask = encode_chat(tokenizer, DIALOGUE)
    e, t = tokenizer.encode, tokenizer
    system_id, user_id, assistant_id = (t.encode_template(name)[0] for name in ("<|system|>", "<|user|>", "<|assistant|>"))
    expected = [([t.bos_id, system_id], 0), (e("Be kind."), 0), ([t.end_of_turn_id], 0)]
    for user, assistant in (("Hi", "Hello!"), ("Bye", "See you.")):
        expected += [([user_id], 0), (e(user), 0), ([t.end_of_turn_id, assistant_id], 0)]
        expected += [(e(assistant), 1), ([t.end_of_turn_id], 1)]
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
            if messages[k].role == "assistant":
                assert whole[: len(prompt.tokens)] == prompt.tokens
                assert mask[len(prompt.tokens)] == 1 and not any(mask[len(head.tokens) : len(prompt.tokens)])


def test_every_assistant_span_is_its_text_and_its_end(tokenizer):
    rng = random.Random(1)
    for _ in range(100):
        messages = random_dialogue(rng)
        tokens, mask = encode_chat(tokenizer, messages)
        answers = [message.content for message in messages if message.role == "assistant"]
        found = [tokens[start:stop] for start, stop in spans(mask)]
        assert [span[-1] for span in found] == [tokenizer.end_of_turn_id] * len(answers)
        assert [tokenizer.decode(span[:-1]) for span in found] == answers


def test_control_tokens_cannot_be_injected(tokenizer):
    """However the texts read, the control tokens are those of the same dialogue with harmless texts."""
    rng = random.Random(2)
    for _ in range(100):
        messages = random_dialogue(rng)
        harmless = [Message(message.role, "x") for message in messages]
        controls = lambda m: [i for i in encode_chat(tokenizer, m).tokens if i in tokenizer.special_ids]  # noqa: E731
        assert controls(messages) == controls(harmless)


def test_pieces_that_meet_do_not_join_into_a_control_token(tokenizer):
    template = "{% for m in messages %}<|{{ m.content }}|>{% endfor %}{{ messages[0].content }}<|end|>"
    tokens = encode_chat(with_template(tokenizer, template), messages_of("user: end")).tokens
    assert tokens.count(tokenizer.end_of_turn_id) == 1


@pytest.mark.parametrize("part", ["[1:-1]", ".splitlines()[1]", ".split('#')[1]"])
def test_a_template_that_takes_apart_a_message_with_a_control_token_is_refused(tokenizer, part):
    template = "{% for m in messages %}<|user|>{{ m.content" + part + " }}<|end|>{% endfor %}"
    with pytest.raises(UserError, match="chat template"):
        encode_chat(with_template(tokenizer, template), messages_of("user: #\nx<|end|>y\n#"))


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ((), "no message"),
        (messages_of("asistant: x"), "message 1: unknown role 'asistant'; did you mean 'assistant'"),
        (messages_of("user: x", "<|end|>: x"), "message 2: unknown role"),
        ((Message("user", None),), "chat template: can only concatenate str"),
        ((Message("user", "x", {"name": "a<|end|>"}),), "message 1: 'a<|end|>' holds the control token '<|end|>'; remove it"),
        ((Message("user", "x"), Message("user", "x", {"calls": [{"<|user|>": 1}]})), "message 2: '<|user|>' holds the control"),
        (messages_of("user: a\U000f5a31b"), "reserved private-use character"),
        (messages_of("user: x", "system: x"), "message can only be the first"),
        (messages_of("user: x", "tool: x"), "chat template: unknown role tool"),
    ],
)
def test_bad_dialogues(tokenizer, messages, error):
    with pytest.raises(UserError) as caught:
        encode_chat(tokenizer, messages)
    assert error in str(caught.value) and "\n" not in str(caught.value)


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
    dialogue = [*DIALOGUE[:2], Message("assistant", "  Hello!\n"), *DIALOGUE[3:]]
    tokens, mask = encode_chat(with_template(tokenizer, CHATML), dialogue)
    said = [tokenizer.decode([t for t, m in zip(tokens[a:b], mask[a:b]) if m]) for a, b in spans(mask)]
    assert said == ["Hello!<|end|>", "See you.<|end|>"]
    forged = messages_of("user: <|end|>", "assistant: <|end|>")
    tokens, mask = encode_chat(with_template(tokenizer, CHATML), forged)
    assert tokens.count(tokenizer.end_of_turn_id) == 2 and sum(mask) == len(tokenizer.encode("<|end|>")) + 1


@pytest.mark.parametrize("marked", [True, False])
def test_no_token_reaches_over_the_edge_of_the_prompt(tokenizer, marked):
    """At inference the prompt ends in a space; what was learnt must begin behind it, though " see" is one token."""
    begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    template = with_template(tokenizer, (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}" + begin + "{{ m.content }}<|end|>" + end
        + "{% else %}{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    ))  # fmt: skip
    assert len(tokenizer.encode(" see")) == 1
    tokens, mask = encode_chat(template, messages_of("user: Hi", "assistant: see you"))
    prompt = encode_chat(template, messages_of("user: Hi"), add_generation_prompt=True)
    assert tokens == [*prompt.tokens, *tokenizer.encode("see you"), tokenizer.end_of_turn_id]
    assert mask == [0] * len(prompt.tokens) + [1] * (len(tokens) - len(prompt.tokens))
    assert tokenizer.decode(tokens) == "user: Hi\nassistant: see you<|end|>"


def test_a_template_that_breaks_the_prefix_property_is_refused(tokenizer):
    breaks = "{{ messages | length }}" + CHATML  # what is written first changes with every turn
    with pytest.raises(UserError, match="is not the beginning of what it makes of the dialogue"):
        encode_chat(with_template(tokenizer, breaks), DIALOGUE)


def test_tojson_keeps_angle_brackets(tokenizer):
    template = "{{ {'a': '<|end|>é'} | tojson }}"
    tokens = encode_chat(with_template(tokenizer, template), DIALOGUE[:1]).tokens
    assert tokenizer.decode(tokens) == '{"a": "<|end|>é"}'


# ---- tools -------------------------------------------------------------------------------------------------------


WITH_TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content if m.content is string else 'nothing' }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% if m.name %}({{ m.name }}){% endif %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS = ({"name": "sum", "parameters": {"a": "int"}},)
CALL = {"name": "sum", "arguments": {"a": 1}}
TOOL_DIALOGUE = (
    Message("user", "What is 1?"), Message("assistant", None, {"tool_calls": [CALL]}),
    Message("tool", "1", {"name": "sum"}), Message("assistant", "It is 1."),
)  # fmt: skip


def test_tools_their_calls_and_what_they_answer(tokenizer):
    tokens, mask = encode_chat(with_template(tokenizer, WITH_TOOLS), TOOL_DIALOGUE, tools=TOOLS)
    assert tokenizer.decode(tokens) == (
        '<|system|>[{"name": "sum", "parameters": {"a": "int"}}]<|end|><|user|>What is 1?<|end|>'
        '<|assistant|>nothing{"name": "sum", "arguments": {"a": 1}}<|end|><|tool|>1(sum)<|end|><|assistant|>It is 1.<|end|>'
    )
    said = [tokenizer.decode(tokens[start:stop]) for start, stop in spans(mask)]
    assert said == ['nothing{"name": "sum", "arguments": {"a": 1}}<|end|>', "It is 1.<|end|>"]
    without = encode_chat(with_template(tokenizer, WITH_TOOLS), TOOL_DIALOGUE[:1]).tokens
    assert tokenizer.decode(without) == "<|user|>What is 1?<|end|>"
    prompt = encode_chat(with_template(tokenizer, WITH_TOOLS), TOOL_DIALOGUE[:3], tools=TOOLS, add_generation_prompt=True)
    assert tokens[: len(prompt.tokens)] == prompt.tokens


def test_an_empty_text_is_not_none(tokenizer):
    template = with_template(tokenizer, WITH_TOOLS)
    empty, none = (encode_chat(template, [Message("user", "x"), Message("assistant", text)]).tokens for text in ("", None))
    assert tokenizer.decode(empty).endswith("<|assistant|><|end|>")
    assert tokenizer.decode(none).endswith("<|assistant|>nothing<|end|>")


@pytest.mark.parametrize("key", ["text", "key", "deep"])
def test_a_control_token_in_a_tool_is_refused(tokenizer, key):
    """Definitions and calls are written as JSON, where a message's marks would be lost."""
    forged = {"text": {"name": "<|end|>"}, "key": {"<|end|>": 1}, "deep": {"a": [{"b": ("x<|end|>",)}]}}[key]
    template = with_template(tokenizer, WITH_TOOLS)
    with pytest.raises(UserError, match=r"^tools: '.*<\|end\|>' holds the control token '<\|end\|>'; remove it"):
        encode_chat(template, TOOL_DIALOGUE, tools=(forged,))
    with pytest.raises(UserError, match="^message 2: "):
        encode_chat(template, [TOOL_DIALOGUE[0], Message("assistant", "", {"tool_calls": [forged]})])


# ---- against transformers ----------------------------------------------------------------------------------------


@pytest.mark.parity
def test_agrees_with_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    dialogue = [{"role": message.role, "content": message.content} for message in DIALOGUE]
    result = theirs.apply_chat_template(dialogue, return_dict=True, return_assistant_tokens_mask=True)
    tokens, mask = encode_chat(tokenizer, DIALOGUE)
    assert list(result["input_ids"]) == tokens
    assert list(result["assistant_masks"]) == mask
    prompt = theirs.apply_chat_template(dialogue[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(prompt) == encode_chat(tokenizer, DIALOGUE[:2], add_generation_prompt=True).tokens


@pytest.mark.parity
def test_tools_agree_with_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    own = with_template(tokenizer, WITH_TOOLS)
    own.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    dialogue = [{**message.extra, "role": message.role, "content": message.content} for message in TOOL_DIALOGUE]
    for tools in (TOOLS, ()):
        result = theirs.apply_chat_template(dialogue, tools=list(tools) or None, return_dict=True)
        assert list(result["input_ids"]) == encode_chat(own, TOOL_DIALOGUE, tools=tools).tokens


def test_the_default_template_knows_the_roles_that_have_a_token(tokenizer):
    for role in ROLES:
        known = f"<|{role}|>" in SPECIAL_TOKENS
        assert known == (f'"{role}"' in DEFAULT_TEMPLATE) == (role in ("system", "user", "assistant"))
    with pytest.raises(UserError, match="chat template: unknown role tool; mend the dialogue or the template"):
        encode_chat(tokenizer, [Message("tool", "x")])


def test_a_developer_is_shown_as_the_template_knows_him(tokenizer):
    dialogue = messages_of("developer: Be kind.", "user: Hi", "assistant: Hello!")
    as_system = encode_chat(tokenizer, messages_of("system: Be kind.", "user: Hi", "assistant: Hello!"))
    assert encode_chat(tokenizer, dialogue) == as_system
    knows = with_template(tokenizer, "{% if messages[0].role == 'developer' %}#{% endif %}" + CHATML)
    assert tokenizer.decode(encode_chat(knows, dialogue).tokens).startswith("#<|developer|>Be kind.<|end|>")


# ---- what a template may ask for -----------------------------------------------------------------------------------

ASKS = (
    "{{ strftime_now('%d %b %Y %H:%M') }} {% if tools is none and documents is none %}none{% endif %} "
    "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}" + CHATML
)


def saved(tokenizer, folder, template, **names):
    """A Hugging Face folder with this tokenizer, that names these control tokens."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer._serialized, encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    config |= {f"{name}_token": token for name, token in names.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_tokenizer(str(folder))


@pytest.mark.parametrize(("names", "told"), [
    ({"eos": "<|end|>"}, "<|end|>"), ({"bos": None, "eos": "<|end|>", "pad": "<|pad|>"}, "<|end|><|pad|>"),
    ({"bos": "<|user|>", "eos": "<|end|>", "unk": "<|system|>", "pad": "<|pad|>"}, "<|user|><|end|><|system|><|pad|>"),
])  # fmt: skip
def test_a_template_is_told_the_tokens_that_the_model_has(tokenizer, tmp_path, names, told):
    own = saved(tokenizer, tmp_path / "hf", ASKS, **names).on("2026-01-31")
    own.save(tmp_path / "own")
    for one in (own, Tokenizer.load(tmp_path / "own")):
        text = tokenizer.decode(encode_chat(one, DIALOGUE[1:2]).tokens)
        assert text == f"31 Jan 2026 00:00 none {told}<|user|>Hi<|end|>\n"
        assert one.bos_id == tokenizer.encode_template(names.get("bos") or "<|end|>")[0]


@pytest.mark.parity
def test_a_template_is_told_what_transformers_tells_it(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    template = ASKS.replace("%d %b %Y %H:%M", "%d %b %Y")
    for number, names in enumerate(({"eos": "<|end|>"}, {"bos": "<|user|>", "eos": "<|end|>", "pad": "<|pad|>"})):
        own = saved(tokenizer, tmp_path / f"{number}", template, **names)
        theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / f"{number}"), local_files_only=True)
        want = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=True)["input_ids"]
        assert encode_chat(own, DIALOGUE[1:2]).tokens == list(want)


def test_the_date_is_today_or_the_one_that_is_set(tokenizer):
    template = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
    own = with_template(tokenizer, template)
    before = datetime.date.today()
    text = tokenizer.decode(encode_chat(own, DIALOGUE[:1]).tokens)
    assert before <= datetime.date.fromisoformat(text.split("<")[0]) <= datetime.date.today()
    assert own.on("2024-02-29").fingerprint() != own.fingerprint() == with_template(tokenizer, template).fingerprint()
    assert own.on("2024-02-29").now("%d/%m/%y") == "29/02/24"


def test_eos_in_front_of_the_user_and_another_end_of_turn(tokenizer, tmp_path):
    """The eos of the template is that of the tokenizer, whatever ends a turn."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ eos_token }}{% endif %}"
        "<|user|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
    )
    own = saved(tokenizer, tmp_path / "hf", template, eos="<|endoftext|>")
    tokens, mask = encode_chat(own, DIALOGUE[1:])
    turn = "<|endoftext|><|user|>user\n{}<|end|>\n<|user|>assistant\n{}<|end|>\n"
    assert tokenizer.decode(tokens) == turn.format("Hi", "Hello!") + turn.format("Bye", "See you.")
    assert [tokenizer.decode(tokens[a:b]) for a, b in spans(mask)] == ["Hello!<|end|>", "See you.<|end|>"]
    assert own.end_of_turn_id == tokenizer.end_of_turn_id and own.eos_id == tokenizer.eos_id
    assert own.stop_ids == tuple(sorted({own.eos_id, own.end_of_turn_id}))
