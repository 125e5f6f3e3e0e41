"""Published vocabularies and chat templates, as the reference libraries read them.

Needs the files themselves: LLMJAX_TEST_DATA names a folder with chat_templates/*.jinja, tokenizers/cs336/ (GPT-2, a BPE of 500
tokens, sample texts) and tokenizers/llama_cpp_vocabs/ (the vocabularies of five models, as json).
"""

import gzip
import json
import os
import pathlib

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llmjax.data.records import Message
from llmjax.data.template import encode_chat
from llmjax.data.tokenizer import Controls, DecodeStream, Tokenizer, TokenizerConfig
from llmjax.errors import UserError
from llmjax.interop.hf_tokenizer import read_tokenizer

DATA = pathlib.Path(os.environ.get("LLMJAX_TEST_DATA", "/nonexistent"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="LLMJAX_TEST_DATA names no folder of published tokenizers")
TEMPLATES = sorted(path.name for path in (DATA / "chat_templates").glob("*.jinja"))
DIALOGUE = [
    Message("user", " Hi there "), Message("assistant", "Hello!"), Message("user", "What is <|im_end|>?"),
    Message("assistant", "See you."),
]  # fmt: skip
# Names of control tokens for which these templates ask.
CONTROLS = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>"]
# The prompt for an answer is not how the answer's turn begins (thoughts are taken out of finished turns), or other fields
# than role and content are wanted.
BREAK_THE_PREFIX = ("R1", "deepseek-r1", "command-r-plus", "firefunction")
# They iterate over the tools, so without any they fail, here and in transformers.
NEED_TOOLS = ("command-r-plus", "Hermes")
# One asks for functions by another name, the other hands a generator to tojson, which is an error in transformers too.
NO_TOOLS = ("fireworks", "llama-cpp")


@pytest.fixture(scope="module", name="base")
def make_base():
    """A byte tokenizer that knows the control tokens of all the templates."""
    own = Tokenizer.train(iter(()), TokenizerConfig(kind="byte"))._serialized
    more = tokenizers.Tokenizer.from_str(own)
    more.add_special_tokens(CONTROLS)
    return more.to_str()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parity
def test_templates_render_as_in_transformers(name, base, tmp_path):
    transformers = pytest.importorskip("transformers")
    template = (DATA / "chat_templates" / name).read_text(encoding="utf-8")
    tokenizer = Tokenizer(base, template, Controls("<|pad|>", "<|endoftext|>", "<|im_end|>", "<|im_end|>"))
    tokenizer.save(tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"), local_files_only=True)
    dialogue = DIALOGUE[:3]
    if name.startswith("fireworks"):
        with pytest.raises(UserError, match="'functions' is undefined"):
            encode_chat(tokenizer, dialogue, add_generation_prompt=True)
        return
    plain = [{"role": message.role, "content": message.content} for message in dialogue]
    if any(part in name for part in NEED_TOOLS):
        with pytest.raises(UserError, match="'NoneType' object is not iterable"):
            encode_chat(tokenizer, dialogue, add_generation_prompt=True)
        with pytest.raises(TypeError, match="'NoneType' object is not iterable"):
            theirs.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        return
    got = tokenizer.decode(encode_chat(tokenizer, dialogue, add_generation_prompt=True).tokens)
    assert got == theirs.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)


TOOL = {
    "type": "function",
    "function": {
        "name": "add", "description": "Adds <two> numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "One."}}, "required": ["a"]},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.startswith(NO_TOOLS)])
@pytest.mark.parity
def test_tools_are_told_as_in_transformers(name, base, tmp_path):
    transformers = pytest.importorskip("transformers")
    template = (DATA / "chat_templates" / name).read_text(encoding="utf-8")
    tokenizer = Tokenizer(base, template, Controls("<|pad|>", "<|endoftext|>", "<|im_end|>", "<|im_end|>"))
    tokenizer.save(tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"), local_files_only=True)
    got = encode_chat(tokenizer, DIALOGUE[:1], tools=[TOOL], add_generation_prompt=True).tokens
    plain = [{"role": "user", "content": " Hi there "}]
    want = theirs.apply_chat_template(plain, tools=[TOOL], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(got) == want
    assert ("add" in want) or name.startswith(("deepseek", "google-gemma", "microsoft"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_of_templates(name, base):
    template = (DATA / "chat_templates" / name).read_text(encoding="utf-8")
    tokenizer = Tokenizer(base, template, Controls("<|pad|>", "<|endoftext|>", "<|im_end|>", "<|im_end|>"))
    tools = [TOOL] if any(part in name for part in NEED_TOOLS) else []
    if any(part in name for part in BREAK_THE_PREFIX):
        with pytest.raises(UserError, match="beginning|undefined"):
            encode_chat(tokenizer, DIALOGUE, tools=tools)
        return
    tokens, mask = encode_chat(tokenizer, DIALOGUE, tools=tools)
    said = tokenizer.decode([token for token, learnt in zip(tokens, mask) if learnt])
    assert "Hello!" in said and "See you." in said and "Hi there" not in said and "What" not in said
    assert any(token in tokenizer.special_ids for token, learnt in zip(tokens, mask) if learnt)


@pytest.mark.parity
def test_gpt2_from_vocab_and_merges(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = DATA / "tokenizers" / "cs336"
    (tmp_path / "vocab.json").write_bytes(gzip.decompress((folder / "gpt2_vocab.json.gz").read_bytes()))
    (tmp_path / "merges.txt").write_bytes((folder / "gpt2_merges.txt").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}))
    ours = read_tokenizer(str(tmp_path))
    theirs = transformers.GPT2TokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert ours.vocab_size == 50257 and ours.end_of_turn_id == ours.eos_id == ours.bos_id == 50256
    assert ours.encode("Hello, world!  It's 2026.") == [15496, 11, 995, 0, 220, 632, 338, 1160, 2075, 13]
    for text in sample_texts():
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text


def sample_texts() -> list[str]:
    folder = DATA / "tokenizers" / "cs336"
    names = ("address.txt", "german.txt", "tinystories_sample.txt", "corpus.en")
    files = [(folder / name).read_text(encoding="utf-8").replace("<|endoftext|>", "") for name in names]
    hard = ["Hello world", " two  spaces\n\n\ttab", "x = {'a': [1, 22, 333]}"]
    return [*files, *hard, "naïve café 東京 😀 \u200d 3.14159 ''''''```"]


def bpe_by_the_definition(word: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Sennrich et al. 2016: the pair of the lowest rank is merged wherever it is, until there is none."""
    while pairs := [(ranks[pair], pair) for pair in zip(word, word[1:]) if pair in ranks]:
        (left, right), merged, i = min(pairs)[1], [], 0
        while i < len(word):
            both = word[i : i + 2] == [left, right]
            merged.append(left + right if both else word[i])
            i += 2 if both else 1
        word = merged
    return word


def test_a_small_reference_bpe(tmp_path):
    folder = DATA / "tokenizers" / "cs336"
    ids = json.loads((folder / "train-bpe-reference-vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8")
    (tmp_path / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    ours = read_tokenizer(str(tmp_path))
    assert ours.vocab_size == len(ids) == 500
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(merges.strip().split("\n"))}
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in sample_texts():
        want = [ids[t] for word, _ in split.pre_tokenize_str(text) for t in bpe_by_the_definition(list(word), ranks)]
        assert ours.encode(text) == want
        assert ours.decode(want) == text


def vocabulary(name: str) -> dict:
    path = DATA / "tokenizers" / "llama_cpp_vocabs" / f"{name}.json.gz"
    return {k.removeprefix("tokenizer.ggml."): v for k, v in json.loads(gzip.decompress(path.read_bytes())).items()}


# What each model's own tokenizer makes of them, by llama.cpp's models/ggml-vocab-*.gguf.out.
KNOWN_TEXTS = ["Hello world", " Hello World!", "w048 7tuijk dsdfhu", "нещо на Български", " this is 🦙.cpp", "3333"]
KNOWN_IDS = {
    "llama-spm": [
        [15043, 3186], [29871, 15043, 2787, 29991],
        [281, 29900, 29946, 29947, 29871, 29955, 9161, 13535, 18031, 2176, 6905], [1538, 4851, 665, 1386, 29713, 1305],
        [29871, 445, 338, 29871, 243, 162, 169, 156, 29889, 8223], [29871, 29941, 29941, 29941, 29941],
    ],
    "falcon": [
        [9856, 1079], [23090, 2889, 12], [98, 55866, 204, 34, 16682, 7149, 36190, 6869, 11481],
        [150, 133, 6207, 151, 215, 150, 134, 5052, 133, 6279, 5052, 223, 151, 216, 49679, 123, 53110, 47043, 7795],
        [414, 304, 3346, 111, 231, 25, 29247], [22287, 30],
    ],
    "starcoder": [
        [8302, 5810], [12009, 10914, 38], [124, 53, 57, 61, 244, 60, 121, 1726, 12568, 10240, 1519, 8290],
        [39916, 8389, 1059, 9504, 40216, 13858, 2073, 8983, 12571, 1539, 10721], [477, 458, 5954, 137, 271, 51, 3779],
        [56, 56, 56, 56],
    ],
    "deepseek-llm": [
        [17464, 1843], [37727, 5427, 0], [86, 15, 19, 23, 207, 22, 83, 3970, 27519, 26016, 3944, 14025],
        [1603, 6476, 620, 91754], [437, 317, 12356, 99, 234, 13, 14743], [18, 18, 18, 18],
    ],
    "bert-bge": [
        [7592, 2088], [7592, 2088, 999], [1059, 2692, 18139, 1021, 8525, 28418, 2243, 16233, 20952, 6979],
        [1192, 15290, 29754, 14150, 1192, 10260, 1181, 29755, 29436, 29741, 10260, 16856, 29747, 23925, 10325],
        [2023, 2003, 100, 1012, 18133, 2361], [21211, 2509],
    ],
}  # fmt: skip


def test_sentencepiece_as_sentencepiece_itself(tmp_path):
    """Llama-2's vocabulary in a tokenizer.model: every text to the ids that the sentencepiece library gives."""
    ours, theirs = llama(tmp_path)
    assert ours.vocab_size == 32000 and ours.end_of_turn_id == ours.eos_id == 2 and ours.bos_id == 1
    for text in sample_texts():
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text
        stream = DecodeStream(ours)
        assert "".join([*map(stream.step, ours.encode(text)), stream.finish()]) == text
    assert [ours.encode(text) for text in KNOWN_TEXTS] == KNOWN_IDS["llama-spm"]
    assert ours.encode("</s>") == theirs.encode("</s>") != [2]
    assert ours.token_bytes()[ours.encode("Hello world")].sum() == len(" Hello world")


def llama(folder, **config):
    sentencepiece = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    raw = vocabulary("llama-spm")
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.name, model.normalizer_spec.remove_extra_whitespaces = "identity", False
    for piece, score, kind in zip(raw["tokens"], raw["scores"], raw["token_type"]):
        model.pieces.add(piece=piece, score=score, type=kind)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return read_tokenizer(str(folder)), sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parity
def test_a_dialogue_is_the_tokens_of_transformers(legacy, tmp_path):
    """Llama-2's template writes no control token around a text, so only whole texts give the reference's tokens."""
    transformers = pytest.importorskip("transformers")
    ours, _ = llama(tmp_path, legacy=legacy, chat_template=LLAMA2)
    ours.save(tmp_path / "saved")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "saved" / "tokenizer.json"))
    rendered = "<s>[INST] Hi there [/INST] Hello! </s><s>[INST] What is </s> ? [/INST] See you. </s>"
    dialogue = [*DIALOGUE[:2], Message("user", "What is this?"), DIALOGUE[3]]
    tokens, mask = encode_chat(ours, dialogue)
    assert tokens == theirs(rendered.replace("What is </s> ?", "What is this?"), add_special_tokens=False)["input_ids"]
    said = [i for i, learnt in zip(tokens, mask) if learnt]
    assert ours.decode(said) == "Hello! </s> See you. </s>" and said.count(ours.eos_id) == 2
    dialogue[2] = Message("user", "What is </s> ?")  # typed by a user: text
    tokens, _ = encode_chat(ours, dialogue)
    assert tokens.count(ours.eos_id) == 2 and "What is </s> ?" in ours.decode(tokens)


def split_of(name: str):
    """The pre-tokenizers that these models publish."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name != "deepseek-llm")
    digits = pre_tokenizers.Digits(individual_digits=name != "falcon")
    if name == "falcon":
        three = pre_tokenizers.Split(tokenizers.Regex("[0-9][0-9][0-9]"), "isolated")
        return pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), byte_level, digits, three])
    if name == "starcoder":
        return pre_tokenizers.Sequence([digits, byte_level])
    patterns = ("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[一-龥ࠀ-一가-퟿]+")
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, digits, byte_level])


@pytest.mark.parametrize("name", ["falcon", "starcoder", "deepseek-llm", "bert-bge"])
def test_published_vocabularies_as_the_tokenizers_library(name, tmp_path):
    raw = vocabulary(name)
    tokens = raw["tokens"]
    if name == "bert-bge":  # there, a word's first piece has a mark, and the others none
        special = {i for i, kind in enumerate(raw["token_type"]) if kind == 3} | {raw["unknown_token_id"]}
        tokens = [t if i in special or t.startswith("[") else t[1:] if t[0] == "▁" else f"##{t}" for i, t in enumerate(tokens)]
        peer = tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
        peer.normalizer, peer.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
        peer.decoder = decoders.WordPiece()
    else:
        merges = [tuple(merge.split(" ")) for merge in raw["merges"]]
        peer = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
        peer.pre_tokenizer, peer.decoder = split_of(name), decoders.ByteLevel()
    peer.add_special_tokens([token for token, kind in zip(tokens, raw["token_type"]) if kind == 3])
    peer.save(str(tmp_path / "tokenizer.json"))
    eos = tokens[raw.get("eos_token_id", raw.get("seperator_token_id"))]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    ours = read_tokenizer(str(tmp_path))
    assert ours.vocab_size == len(tokens)
    for text in sample_texts():
        ids = peer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == peer.decode(ids, skip_special_tokens=False)
        assert name == "bert-bge" or ours.decode(ids) == text
        assert name == "deepseek-llm" or ours.decode(ids, skip_special=True) == peer.decode(ids)
    assert [ours.encode(text) for text in KNOWN_TEXTS] == KNOWN_IDS[name]
