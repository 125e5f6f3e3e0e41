"""A prompt's tokens begin the dialogue's, and the loss is on the assistant's words and end of turn: templates by tokenizers."""

import functools
import itertools
import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmjax.data.records import Message
from llmjax.data.template import DEFAULT_TEMPLATE, encode_chat
from llmjax.data.tokenizer import END_OF_TURN, SPECIAL_TOKENS, Tokenizer
from llmjax.interop.hf_tokenizer import PLAIN_TEMPLATE

CORPUS = ["Hello he, see you.\n\nhe he Be kind.\n\n\nuser: assistant: User: Assistant: he he, see. you  see\n\n  x"] * 20
ASK = "{% if add_generation_prompt %}"
LOOP = "{{ '<|endoftext|>' }}{% for m in messages %}"
# What stands between a role and its words is what a token could reach over.
TEMPLATES = {
    "own": DEFAULT_TEMPLATE,
    "plain, marked": PLAIN_TEMPLATE,
    "plain": LOOP + "{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<|end|>{% else %}\n\n{% endif %}{% endfor %}"
    + ASK + "assistant: {% endif %}",
    "no space": LOOP + "{{ m.role }}:{{ m.content }}<|end|>\n{% endfor %}" + ASK + "assistant:{% endif %}",
    "ChatML": LOOP + "<|user|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}" + ASK + "<|user|>assistant\n{% endif %}",
    "Llama 3": LOOP + "<|user|>{{ m.role }}<|system|>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    + ASK + "<|user|>assistant<|system|>\n\n{% endif %}",
    "two spaces": LOOP + "{{ m.role }}  {{ m.content }}<|end|> {% endfor %}" + ASK + "assistant  {% endif %}",
    "a letter": LOOP + "{{ m.role }}\nh{{ m.content }}<|end|>\n{% endfor %}" + ASK + "assistant\nh{% endif %}",
}  # fmt: skip


def byte_level(split=None, trim=None, prefix=False):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split is None)
    pattern = split and pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pattern, own]) if pattern else own
    tokenizer.decoder = decoders.ByteLevel()
    if trim is not None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(SPECIAL_TOKENS), show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def sentencepiece(scheme=None):
    """scheme: of Metaspace; None: the normalizer of older files, which puts a space in front of every stretch of text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)] if scheme != "never" else spaces)
    special = ["<unk>", *SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [f"{word} " for text in CORPUS for word in text.split()]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    contents = json.loads(tokenizer.to_str())
    contents["added_tokens"] = [token for token in contents["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(contents)


LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TOKENIZERS = {
    "byte-level": byte_level,
    "byte-level, offsets whole": functools.partial(byte_level, trim=False),
    "byte-level, offsets trimmed": functools.partial(byte_level, trim=True),
    "byte-level, a space first": functools.partial(byte_level, trim=True, prefix=True),
    "byte-level, Llama 3": functools.partial(byte_level, split=LLAMA3, trim=True),
    "sentencepiece, every stretch": sentencepiece,
    "sentencepiece, always": functools.partial(sentencepiece, scheme="always"),
    "sentencepiece, first": functools.partial(sentencepiece, scheme="first"),
    "sentencepiece, never": functools.partial(sentencepiece, scheme="never"),
}
WORDS = ["he", "see", "you", " he", "  x", ".", "\n", "\n\nhe", "é", "<|end|>", "he he", " "]


@functools.cache
def made(name):
    return TOKENIZERS[name]()


def dialogues(count):
    rng = random.Random(0)
    for _ in range(count):
        said = ["".join(rng.choices(WORDS, k=rng.randrange(1, 4))) for _ in range(6)]
        yield [Message(("user", "assistant")[i % 2], text if text.strip() else "he") for i, text in enumerate(said)]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_prompt_begins_the_dialogue_and_the_loss_is_on_the_answer(template, tokenizer):
    own = Tokenizer(made(tokenizer), TEMPLATES[template])
    end = own.eos_id if template == "plain, marked" else own.end_of_turn_id
    assert END_OF_TURN in own.control_names
    for messages in dialogues(20):
        tokens, mask = encode_chat(own, messages)
        for turn in (1, 3, 5):
            prompt = encode_chat(own, messages[:turn], add_generation_prompt=True).tokens
            assert tokens[: len(prompt)] == prompt
            learnt = list(itertools.takewhile(lambda i: mask[i], range(len(prompt), len(tokens))))
            *words, last = [tokens[i] for i in learnt]
            said = messages[turn].content.strip() if "trim" in TEMPLATES[template] else messages[turn].content
            assert last == end
            text = own.decode(words)
            assert text == said or (own.drops_first_space or "a space" in tokenizer) and text.strip() == said.strip()
            assert not mask[len(prompt) - 1]
        assert sum(1 for on, _ in itertools.groupby(mask) if on) == 3
