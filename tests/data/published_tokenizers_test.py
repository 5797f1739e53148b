"""Tokenizers like published ones: specials, new text, text that changes."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import (
  AddedToken,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from ultramem_jax import data
from ultramem_jax.data import encoding, packing, tokenizer
from ultramem_jax.settings.errors import ConfigError

SENTENCE = "the quick brown fox jumps over the lazy dog"
SPECIALS = ["<unk>", "<s>", "</s>"]


def llama():
  """A space before a text and none at its beginning; bytes of what is rare."""
  made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  made.decoder = decoders.Sequence(
    [
      decoders.Replace("\u2581", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  # Words of their own, which merges across spaces would join.
  words = [f"\u2581{word}" for word in SENTENCE.split()]
  trainer = trainers.BpeTrainer(
    special_tokens=[*SPECIALS, *(f"<0x{i:02X}>" for i in range(256))],
    show_progress=False,
  )
  made.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
  made.train_from_iterator([SENTENCE, *words] * 9, trainer)
  content = json.loads(made.to_str())
  content["added_tokens"] = content["added_tokens"][:3]
  made = tokenizers.Tokenizer.from_str(json.dumps(content))
  made.post_processor = processors.TemplateProcessing(
    single="<s> $A", pair=None, special_tokens=[("<s>", 1)]
  )
  return made


def unigram():
  """The specials are pieces of the vocabulary, with the best of scores."""
  words = ["\u2581", *(f"\u2581{word}" for word in SENTENCE.split())]
  letters = [(c, -9.0) for c in "abcdefghijklmnopqrstuvwxyz</>"]
  pieces = [(name, 0.0) for name in SPECIALS] + [(w, -1.0) for w in words]
  made = tokenizers.Tokenizer(models.Unigram([*pieces, *letters], unk_id=0))
  made.pre_tokenizer = pre_tokenizers.Metaspace()
  made.decoder = decoders.Metaspace()
  made.add_special_tokens(SPECIALS)
  return made


def bert():
  made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
  made.normalizer = normalizers.BertNormalizer()
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  made.decoder = decoders.WordPiece()
  names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
  trainer = trainers.WordPieceTrainer(special_tokens=names, show_progress=False)
  made.train_from_iterator([SENTENCE] * 9, trainer)
  made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
  return made


def stripping():
  """Byte-level, but spaces around a text are lost."""
  made = byte_level(SPECIALS)
  made.normalizer = normalizers.Strip()
  made.decoder = decoders.Sequence(
    [decoders.ByteLevel(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  return made


def byte_level(names):
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    special_tokens=names,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator([SENTENCE] * 9, trainer)
  return made


KINDS = [llama, unigram, bert, stripping]


@pytest.fixture
def load(tmp_path):
  """Loads a tokenizer through a file, with other files beside it."""

  def load(made, beside=(), **names):
    folder = tmp_path / "tokenizer"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
      path.unlink()
    made.save(str(folder / "tokenizer.json"))
    for name, content in dict(beside).items():
      (folder / name).write_text(
        content if isinstance(content, str) else json.dumps(content)
      )
    return tokenizer.load(str(folder), **names)

  return load


def names(made, loaded):
  return [
    made.id_to_token(i) for i in (loaded.bos_id, loaded.eos_id, loaded.pad_id)
  ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_space_before_a_new_text_is_kept(load, kind):
  loaded = load(kind())
  ids = loaded.encode(SENTENCE)
  words = SENTENCE.split()
  for count in range(1, len(words)):
    prompt = " ".join(words[:count])
    before = loaded.encode(prompt)
    np.testing.assert_array_equal(before, ids[: len(before)])
    new = tokenizer.new_text(
      loaded, [loaded.bos_id, *before], [*ids[len(before) :], loaded.eos_id]
    )
    assert prompt + new == SENTENCE
  assert tokenizer.new_text(loaded, [loaded.bos_id], ids) == SENTENCE
  assert tokenizer.new_text(loaded, ids, []) == ""


@pytest.mark.parametrize("make", [tokenizer.ByteTokenizer, llama])
def test_a_character_that_begins_in_the_prompt(load, make):
  loaded = make() if make is tokenizer.ByteTokenizer else load(make())
  ids = loaded.encode("a \u6f22")
  for cut in (1, 2):
    new = tokenizer.new_text(loaded, ids[:-cut], ids[-cut:])
    assert new == "\u6f22"


@pytest.mark.parametrize(
  "given, usual",
  [
    (["<|endoftext|>"], ["<|endoftext|>"] * 3),
    (
      [
        "<\uff5c\u2581pad\u2581\uff5c>",
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
      ],
      [
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<\uff5c\u2581pad\u2581\uff5c>",
      ],
    ),
    (
      ["<PAD>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"],
      ["<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<PAD>"],
    ),
  ],
)
def test_usual_names(load, given, usual):
  made = byte_level(given)
  assert names(made, load(made)) == usual


def test_declared_specials_come_before_usual_names(load):
  made = byte_level(["<a>", "<b>", "<c>", "<eos>", "<s>"])
  assert names(made, load(made)) == ["<s>", "<eos>", "<eos>"]
  made.post_processor = processors.Sequence(
    [
      processors.ByteLevel(),
      processors.TemplateProcessing(
        single="<b> $A <a> <c>",
        pair=None,
        special_tokens=[("<a>", 0), ("<b>", 1), ("<c>", 2)],
      ),
    ]
  )
  assert names(made, load(made)) == ["<b>", "<a>", "<a>"]
  beside = {
    "special_tokens_map.json": {"bos_token": "<a>", "eos_token": "<a>"},
    "tokenizer_config.json": {
      "eos_token": {"content": "<c>", "lstrip": False},
      "bos_token": None,
      "pad_token": "[not in the vocabulary]",
    },
  }
  assert names(made, load(made, beside)) == ["<a>", "<c>", "<c>"]
  loaded = load(made, beside, eos="<b>", pad="<c>")
  assert names(made, loaded) == ["<a>", "<b>", "<c>"]
  assert names(bert(), load(bert())) == ["[CLS]", "[SEP]", "[PAD]"]


def test_names_that_cannot_be_are_refused(load):
  made = byte_level(["<a>"])
  for beside, given, message in [
    ({}, {}, "data.eos_token = '': .* does not say which .* tokens: <a>$"),
    ({}, {"eos": "<b>"}, "data.eos_token = '<b>': is not a token of .*: <a>$"),
    ({}, {"pad": "<b>"}, "data.pad_token = '<b>': is not a token of "),
    ({"tokenizer_config.json": "{"}, {}, "tokenizer_config.json: is not JSON"),
    ({"tokenizer_config.json": "[" * 99999}, {}, "is not JSON"),
    ({"special_tokens_map.json": "[]"}, {}, "must hold a mapping"),
  ]:
    with pytest.raises(ConfigError, match=message) as caught:
      load(made, beside, **given)
    assert "\n" not in str(caught.value)
  with pytest.raises(ConfigError, match=r"data.bos_token = 'x': bytes have"):
    tokenizer.load("bytes", bos="x")


def test_a_token_that_is_not_special_ends_no_text(load):
  """Unless it is named; then it does not come from text any more."""
  made = byte_level(["<a>"])
  made.add_tokens([AddedToken("</s>", special=False)])
  with pytest.raises(ConfigError, match="does not say which token"):
    load(made)
  for beside, given in [
    ({}, {"eos": "</s>"}),
    ({"tokenizer_config.json": {"eos_token": "</s>"}}, {}),
  ]:
    loaded = load(made, beside, **given)
    assert loaded.eos_id == made.token_to_id("</s>")
    ids = loaded.encode("one </s> two")
    assert loaded.eos_id not in ids
    assert loaded.decode([*ids, loaded.eos_id]) == "one </s> two"
  # A word of the vocabulary that was never added.
  made = tokenizers.Tokenizer(models.WordLevel({"x": 0, "E": 1, "</s>": 2}))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  made.model.unk_token = "x"
  loaded = load(made, eos="</s>")
  assert loaded.eos_id == 2
  assert 2 not in loaded.encode("E </s> E")


def test_specials_in_the_vocabulary_do_not_come_from_text(load):
  made = unigram()
  made.encode_special_tokens = True
  assert made.encode("</s>").ids[-1] == 2  # what the library does
  loaded = load(unigram())
  assert loaded.eos_id == 2
  ids = loaded.encode("the</s> fox <s>\u6f22")
  assert not {1, 2} & {*ids.tolist()} and 0 in ids
  assert loaded.decode(ids).count("/s") == 1
  assert loaded.encode(SENTENCE).tolist() == made.encode(SENTENCE).ids


def damaged(change):
  content = json.loads(byte_level(["<eos>"]).to_str())
  change(content)
  return json.dumps(content)


def test_damaged_files_are_told_in_a_line(tmp_path, capfd):
  """The library itself may end the program, and write pages to stderr."""
  charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
  path = tmp_path / "tokenizer.json"
  for content in (
    damaged(lambda c: c.update(normalizer=charsmap)),
    damaged(lambda c: c["model"]["merges"].append(["no", "token"])),
    damaged(lambda c: c.pop("model")),
    damaged(lambda c: None)[:-9],
    # These raise when they meet a character that they lack.
    damaged(
      lambda c: c.update(
        model={"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}
      )
    ),
    damaged(
      lambda c: c.update(
        model={"type": "WordLevel", "unk_token": "?", "vocab": {"a": 0}}
      )
    ),
    "[" * 99999,
    "",
  ):
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
      tokenizer.load(str(path))
    assert str(caught.value).startswith(
      f"data.tokenizer = {str(path)!r}: is not a tokenizer.json ("
    )
    assert "\n" not in str(caught.value)
  assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
  "normalizer",
  [
    normalizers.NFKC(),
    normalizers.Lowercase(),
    normalizers.Strip(),
    normalizers.Replace(" ", "\u2581"),
    normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
  ],
)
def test_bytes_are_those_of_the_text(load, normalizer):
  """Whatever a normalizer makes of it: bits per byte compare tokenizers."""
  made = byte_level(["<eos>"])
  made.normalizer = normalizer
  loaded = load(made)
  for text in (" \ufb01sh, \xc9l\xe8ve \u2460  ", "   ", "\u2581"):
    document = encoding.encode(text, loaded)
    counts_T = packing.byte_counts(
      packing.Piece(document, 0, len(document.tokens_T))
    )
    assert counts_T.sum() == len(text.encode())


def test_text_that_changes_is_told(load, make_config, tmp_path):
  for index in range(60):
    (tmp_path / f"{index}.txt").write_text(f"{SENTENCE} {index} and a Cat")

  def described():
    config = make_config(
      source="text",
      path=f"{tmp_path}/*.txt",
      tokenizer=str(tmp_path / "tokenizer"),
    )
    model = dataclasses.replace(config.model, vocab_size=300)
    return data.open(dataclasses.replace(config, model=model)).describe()

  made = byte_level(["<eos>"])
  load(made)
  assert "changes text" not in described()
  made.normalizer = normalizers.Lowercase()
  load(made)
  assert "; the tokenizer changes text: " in described()
  assert "d a C' comes back as '" in described()
