"""Dialogues with system turns, tools, calls and results: the ids of transformers, by published templates.

Needs the templates themselves (LLMJAX_TEST_DATA names a folder with chat_templates/*.jinja) and transformers.
"""

import json
import os
import pathlib

import pytest

from llmjax.data.formats import DIALOGUE_FORMATS, recognise
from llmjax.data.template import encode_chat
from llmjax.data.tokenizer import Controls, Tokenizer, TokenizerConfig
from llmjax.errors import UserError

DATA = pathlib.Path(os.environ.get("LLMJAX_TEST_DATA", "nowhere")) / "chat_templates"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not DATA.is_dir(), reason="LLMJAX_TEST_DATA does not name a folder with chat_templates/"),
]

# template -> its bos and end of turn
TEMPLATES = {
    "Qwen-Qwen2.5-7B-Instruct": ("<|endoftext|>", "<|im_end|>"),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("<|begin_of_text|>", "<|im_end|>"),
    "meta-llama-Llama-3.1-8B-Instruct": ("<|begin_of_text|>", "<|eot_id|>"),
    "meta-llama-Llama-3.2-3B-Instruct": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("<s>", "</s>"),
    "meetkai-functionary-medium-v3.1": ("<|begin_of_text|>", "<|eot_id|>"),
    "meetkai-functionary-medium-v3.2": ("<|begin_of_text|>", "<|eot_id|>"),
}
CONTROLS = [
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>", "<s>",
    "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "<|im_start|>", "<|im_end|>",
]  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town, now <or> later & so on.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "description": "Its name"}},
            "required": ["town"],
        },
    },
}
RECORD = {
    "messages": [
        {"role": "system", "content": "You are a guide."},
        {"role": "user", "content": "  How is it in Holford? "},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"town": "Holford"}}}]},
        {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "{\"sky\": \"grey\"}"},
        {"role": "assistant", "content": "Grey, I am afraid."},
        {"role": "user", "content": "Thank you!"},
        {"role": "assistant", "content": "You are welcome."},
    ],
    "tools": [WEATHER],
}  # fmt: skip


def with_text_arguments(record: dict) -> dict:
    """The same with the arguments of calls as JSON text, which some templates want."""
    messages = json.loads(json.dumps(record["messages"]))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return record | {"messages": messages}


def without_tools(record: dict) -> dict:
    plain = [m for m in record["messages"] if m["role"] != "tool" and "tool_calls" not in m]
    return {"messages": plain}


@pytest.fixture(scope="module")
def base() -> str:
    """A byte tokenizer with the control tokens of these templates."""
    tokenizer = Tokenizer.train([], TokenizerConfig(kind="byte"))
    copy = tokenizer._template
    copy.add_special_tokens(CONTROLS)
    return copy.to_str()


def pair(name: str, base: str, folder):
    """Our tokenizer and transformers', of one template."""
    transformers = pytest.importorskip("transformers")
    bos, end = TEMPLATES[name]
    template = (DATA / f"{name}.jinja").read_text(encoding="utf-8")
    ours = Tokenizer(base, template, Controls("<|pad|>", bos, end, end))
    ours.save(folder / "tokenizer")
    return ours, transformers.AutoTokenizer.from_pretrained(str(folder / "tokenizer"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "tools") for name in TEMPLATES] + [(name, "plain") for name in TEMPLATES if "tool_use" not in name],
)
def test_ids_are_those_of_transformers(name, kind, base, tmp_path):
    record = RECORD if kind == "tools" else without_tools(RECORD)
    if "functionary" in name:
        record = with_text_arguments(record)
    if "Mistral" in name:  # shows a system message only while the last word is the user's
        record = record | {"messages": record["messages"][1:]}
    ours, theirs = pair(name, base, tmp_path)
    dialogue = recognise(DIALOGUE_FORMATS, record).read(record)
    want = theirs.apply_chat_template(record["messages"], tools=record.get("tools"), tokenize=True, return_dict=False)
    chat = encode_chat(ours, dialogue.messages, tools=dialogue.tools)
    assert chat.tokens == want
    learnt = ours.decode([token for token, learn in zip(*chat) if learn])
    assert "You are welcome." in learnt and "Thank you" not in learnt and "grey" not in learnt and "guide" not in learnt
    assert chat.loss_mask[-1] or ours.decode(chat.tokens[-1:]).isspace()
    if kind == "tools" and "Mistral" not in name:  # that one moves the tools to the last question: only its answer is learnt
        assert "Holford" in learnt and "How is it" not in learnt  # the call is the assistant's own


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_control_token_in_a_call_is_refused(name, base, tmp_path):
    ours, _ = pair(name, base, tmp_path)
    record = {"messages": [dict(m) for m in RECORD["messages"]], "tools": [WEATHER]}
    call = {"name": "weather", "arguments": {"town": f"x{TEMPLATES[name][1]}y"}}
    record["messages"][2] = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    dialogue = recognise(DIALOGUE_FORMATS, record).read(record)
    with pytest.raises(UserError, match="message 3: .* holds the control token"):
        encode_chat(ours, dialogue.messages, tools=dialogue.tools)
