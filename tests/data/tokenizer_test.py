"""Tokenizers: ids, specials, lossless text, and errors."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers

from ultramem_jax.data import tokenizer, train_bpe
from ultramem_jax.settings.errors import ConfigError

TEXTS = [
  "",
  "def f(x):\n  return x  # é 漢字 \U0001f600",
  "\t\r\n\x00 <eos><bos>",
]


def train(tmp_path, specials=("<pad>", "<bos>", "<eos>")):
  """A trained tokenizer.json with its specials renamed."""
  trained = train_bpe.train(["def f(x):\n  return x\n"] * 9, 280).to_str()
  for ours, theirs in zip(train_bpe.SPECIALS, specials, strict=True):
    trained = trained.replace(f'"{ours}"', f'"{theirs}"')
  path = tmp_path / "tokenizer.json"
  path.write_text(trained)
  return str(path)


def test_bytes():
  loaded = tokenizer.load("bytes")
  ids = loaded.encode("aé")
  np.testing.assert_array_equal(ids, np.array([97, 195, 169], np.int32))
  assert ids.dtype == np.int32
  assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (256, 257, 258)
  assert loaded.vocab_size == 259
  for text in TEXTS:
    assert loaded.decode(loaded.encode(text)) == text


def test_bytes_decode_skips_specials_and_replaces_broken_text():
  loaded = tokenizer.load("bytes")
  assert loaded.decode(np.array([257, 97, 263, 195, 258])) == "a\ufffd"


def test_file_is_lossless_and_never_makes_specials_of_text(tmp_path):
  loaded = tokenizer.load(train(tmp_path))
  assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (0, 1, 2)
  for text in TEXTS:
    ids = loaded.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert not set(ids) & {0, 1, 2}
    assert ids.max(initial=0) < loaded.vocab_size
    assert loaded.decode([1, *ids, 2, loaded.vocab_size + 5]) == text


def test_file_that_asks_for_other_tokens_is_not_obeyed(tmp_path):
  """Truncated, padded, or drawn at random."""
  path = train(tmp_path)
  raw = tokenizers.Tokenizer.from_file(path)
  raw.enable_truncation(2)
  raw.enable_padding(length=3)
  raw.model.dropout = 1.0
  raw.save(path)
  loaded = tokenizer.load(path)
  ids = loaded.encode("def f(x)")
  assert loaded.decode(ids) == "def f(x)"
  assert len(ids) < len("def f(x)")


def test_names_of_gpt_neox(tmp_path):
  """<|endoftext|> both begins and ends, <|padding|> pads."""
  path = train(tmp_path, ("<|padding|>", "<|unused|>", "<|endoftext|>"))
  loaded = tokenizer.load(path)
  assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (0, 2, 2)


def test_missing_bos_and_pad_fall_back_to_eos(tmp_path):
  loaded = tokenizer.load(train(tmp_path, ("[A]", "[B]", "</s>")))
  assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (2, 2, 2)


def test_special_tokens_keep_what_their_file_says_of_them(tmp_path):
  """Such as that one swallows the space after it, as `transformers` does."""
  made = train_bpe.train(["hi yo"] * 9, 270)
  end = tokenizers.AddedToken("<|end|>", special=True, rstrip=True)
  made.add_special_tokens([end])
  path = tmp_path / "tokenizer.json"
  made.save(str(path))
  loaded = tokenizer.load(str(path), eos="<|end|>")
  text = "hi<|end|>\nyo"
  expected = made.encode(text, add_special_tokens=False).ids
  assert loaded.encode(text, names_specials=True).tolist() == expected


def test_errors(tmp_path):
  with pytest.raises(ConfigError, match=r"data.tokenizer = .*no such file"):
    tokenizer.load(str(tmp_path / "none.json"))
  (tmp_path / "bad.json").write_text("{}")
  with pytest.raises(ConfigError, match=r"is not a tokenizer.json"):
    tokenizer.load(str(tmp_path / "bad.json"))
  path = train(tmp_path, ("<pad>", "<bos>", "[STOP]"))
  message = (
    r"data.eos_token = '': .* does not say which token ends a text; name one "
    r"of its special tokens: <bos>, <pad>, \[STOP\]$"
  )
  with pytest.raises(ConfigError, match=message):
    tokenizer.load(path)


def test_an_id_beyond_all_vocabularies_is_refused_at_once(tmp_path):
  path = pathlib.Path(train(tmp_path))
  held = json.loads(path.read_text())
  held["model"]["vocab"]["a"] = 2**32 - 1
  path.write_text(json.dumps(held))
  with pytest.raises(ConfigError, match=r"has a token of the id 4294967295"):
    tokenizer.load(str(path))


def test_model_must_hold_the_vocabulary():
  loaded = tokenizer.load("bytes")
  tokenizer.check_vocab(259, loaded)
  message = "model.vocab_size = 258: must be at least 259"
  with pytest.raises(ConfigError, match=message):
    tokenizer.check_vocab(258, loaded)
