"""Chat templates: what a model sees, and which of it is learned."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from ultramem_jax import data
from ultramem_jax.data import encoding, forms, tokenizer, train_bpe
from ultramem_jax.data.documents import Example
from ultramem_jax.data.sources import Splits
from ultramem_jax.serve import generate
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.sampling import Sampling

CHATML = """{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

LLAMA = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + message.content + eos_token }}
{%- endgeneration %}{% endif %}
{%- endfor %}"""

TURNS = [
  {"role": "user", "content": "a quick fox?"},
  {"role": "assistant", "content": " yes é "},
  {"role": "user", "content": "and"},
  {"role": "assistant", "content": "no"},
]


def chatml():
  """(tokenizer, files beside it) as of Qwen: a turn has an end, no bos."""
  made = train_bpe.train(["a quick brown fox"], 270)
  made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
  config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None}
  return made, {"tokenizer_config.json": config, "chat_template.jinja": CHATML}


def llama():
  """As of Llama 2: a space before a text, and a template in the config."""
  letters = [(c, -9.0) for c in "abcdefghijklmnopqrstuvwxyz[]/INST?é"]
  pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\u2581", -5.0)]
  made = Tokenizer(models.Unigram([*pieces, *letters], unk_id=0))
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  made.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
  made.decoder = decoders.Metaspace()
  made.add_special_tokens(["<unk>", "<s>", "</s>"])
  templates = [
    {"name": "tools", "template": "no"},
    {"name": "default", "template": LLAMA},
  ]
  config = {"bos_token": "<s>", "eos_token": "</s>"}
  return made, {"tokenizer_config.json": config | {"chat_template": templates}}


@pytest.fixture
def save(tmp_path):
  """Saves a tokenizer and files beside it; returns the folder."""

  def save(made, beside):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    for name, content in beside.items():
      if content is None:
        continue
      text = content if isinstance(content, str) else json.dumps(content)
      (folder / name).write_text(text)
    return str(folder)

  return save


@pytest.fixture
def opened(save, make_config, tmp_path):
  """Returns the config of conversations with a tokenizer."""

  def opened(kind, conversations=(TURNS,), beside=(), **others):
    made, files = kind()
    path = tmp_path / "chats.jsonl"
    lines = (json.dumps({"messages": c}) + "\n" for c in conversations)
    path.write_text("".join(lines))
    config = make_config(
      source="text",
      path=str(path),
      valid_path=str(path),
      records="answers",
      tokenizer=save(made, files | dict(beside)),
      **others,
    )
    model = dataclasses.replace(config.model, vocab_size=300)
    return dataclasses.replace(config, model=model)

  return opened


@pytest.mark.parametrize(
  ("kind", "parts"),
  [
    (
      chatml,
      [
        "<|im_start|>user\na quick fox?<|im_end|>\n<|im_start|>assistant\n",
        "yes é<|im_end|>",
        "\n<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n",
        "no<|im_end|>",
        "\n",
      ],
    ),
    (
      llama,
      [
        "<s>[INST] a quick fox? [/INST]",
        "  yes é </s>",
        "[INST] and [/INST]",
        " no</s>",
        "",
      ],
    ),
  ],
)
def test_a_conversation_is_what_its_template_writes(
  opened, kind, parts, monkeypatch
):
  config = opened(kind, seq_len=120)
  (example,) = Splits(config.data).valid.documents()
  assert isinstance(example, Example)
  assert example.text == "".join(parts)
  assert [example.text[a:b] for a, b in example.answers] == parts[1::2]
  loaded = tokenizer.load(config.data.tokenizer)
  encoded = encoding.encode(example, loaded)
  # The tokens are those that the library gives to the text as a whole.
  library = Tokenizer.from_file(f"{config.data.tokenizer}/tokenizer.json")
  whole = library.encode("".join(parts), add_special_tokens=False).ids
  assert encoded.tokens_T.tolist() == whole
  for (start, stop), answer in zip(encoded.learned, parts[1::2], strict=True):
    ids = encoded.tokens_T[start:stop]
    assert ids[-1] == loaded.eos_id
    shown = library.decode(ids.tolist(), skip_special_tokens=False)
    assert "".join(shown.split()) == "".join(answer.split())

  corpus = data.open(config)
  batch = next(iter(corpus.valid(range(3))))
  answers = sum(stop - start for start, stop in encoded.learned)
  assert batch["weights"].sum() == answers
  assert batch["bytes"].sum() == len(" yes é no".encode())
  # What the model sees before an answer is what it is asked with.
  prompts = []

  def answer(model, variables, prompts_T, *rest, **options):
    prompts.extend(prompts_T)
    return [encoded.tokens_T[slice(*encoded.learned[0])]]

  monkeypatch.setattr(generate, "generate", answer)
  texts = generate.generate_text(
    None,
    None,
    loaded,
    [TURNS[0]["content"]],
    Sampling(9),
    seed=0,
    chat=forms.open_template(config.data),
  )
  assert texts[0].strip() == "yes é"
  first = encoded.learned[0][0]
  assert encoded.tokens_T[:first].tolist() == prompts[0].tolist()


def test_an_answer_ends_with_its_turn(opened, monkeypatch):
  """As of models whose eos ends documents only."""

  def of_documents():
    made, files = chatml()
    made.add_special_tokens(["<|endoftext|>"])
    return made, files | {
      "tokenizer_config.json": {"eos_token": "<|endoftext|>"}
    }

  config = opened(of_documents)
  template = forms.open_template(config.data)
  assert template.end_of_turn() == "<|im_end|>"
  loaded = data.open(config).tokenizer
  (document,) = Splits(config.data).valid.documents()
  whole = encoding.encode(document, loaded).tokens_T
  start = encoding.encode(document, loaded).learned[0][0]

  def answer(model, variables, prompts, *rest, eos_id, finished):
    assert eos_id == loaded.eos_id
    assert finished([whole[start:], whole[start : start + 2]]) == [True, False]
    return [whole[start:]]  # it goes on with the turns after its own

  monkeypatch.setattr(generate, "generate", answer)
  (text,) = generate.generate_text(
    None, None, loaded, ["a"], Sampling(9), seed=0, chat=template
  )
  assert text.strip() == "yes é"


def test_tokens_that_settings_name_are_in_the_text(opened):
  beside = {"tokenizer_config.json": None, "chat_template.jinja": LLAMA}
  config = opened(llama, beside=beside, bos_token="</s>", eos_token="<s>")
  (example,) = Splits(config.data).valid.documents()
  assert isinstance(example, Example)
  assert example.text.startswith("</s>[INST]")
  assert example.text.endswith("no<s>")


def test_a_template_sees_the_tokens_that_no_file_beside_it_declares(opened):
  """As of a tokenizer of one's own, of which only tokenizer.json says them."""

  def of_ones_own():
    return train_bpe.train(["a quick brown fox"], 270), {
      "chat_template.jinja": "{{ bos_token }}{% for message in messages %}"
      "{{ message.role }}: {{ message.content }}"
      "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}|"
      "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    }

  config = opened(of_ones_own)
  (example,) = Splits(config.data).valid.documents()
  bos, eos = "<bos>", "<eos>"
  assert isinstance(example, Example)
  assert example.text.startswith(f"{bos}user: a quick fox?|")
  answers = [example.text[a:b] for a, b in example.answers]
  assert answers == [f" yes é {eos}", f"no{eos}"]
  assert forms.open_template(config.data).end_of_turn() == eos


def test_an_eos_that_its_file_does_not_call_special_ends_turns(opened):
  def plain_eos():
    made, files = chatml()
    made.add_tokens(["<|x|>"])
    template = files["chat_template.jinja"].replace("<|im_end|>", "<|x|>")
    return made, {
      "tokenizer_config.json": {"eos_token": "<|x|>"},
      "chat_template.jinja": template,
    }

  config = opened(plain_eos)
  (example,) = Splits(config.data).valid.documents()
  assert isinstance(example, Example)
  assert [example.text[a:b] for a, b in example.answers] == [
    "yes é<|x|>",
    "no<|x|>",
  ]
  template = forms.open_template(config.data)
  assert template.end_of_turn() == "<|x|>"
  with pytest.raises(ConfigError, match=r"a message holds '<\|x\|>'"):
    template.prompt("so <|x|>", "--prompt")


@pytest.mark.parametrize("end", ["<|im_end|>", ""])
def test_a_prompt_may_open_a_thought_that_answers_do_not_repeat(opened, end):
  opening = "assistant\n<think>\n{% endif"
  thinking = CHATML.replace("assistant\n{% endif", opening)
  # Where answers have no end, that of questions is none of theirs.
  of_questions = "{% if message.role == 'user' %}<|im_end|>{% endif %}"
  if not end:
    thinking = thinking.replace("<|im_end|>", of_questions)
  config = opened(chatml, beside={"chat_template.jinja": thinking})
  template = forms.open_template(config.data)
  assert template.prompt("a", "--prompt").endswith("assistant\n<think>\n")
  assert template.end_of_turn() == end


def test_parquet_holds_the_same_conversations(opened, texts_of, tmp_path):
  import pyarrow as pa
  from pyarrow import parquet

  config = opened(chatml)
  path = tmp_path / "chats.parquet"
  # Nulls are what other rows have.
  turns = [turn | {"name": None} for turn in TURNS]
  kind = pa.list_(
    pa.struct([(n, pa.string()) for n in ("role", "content", "name")])
  )
  table = pa.table({"messages": pa.array([turns], kind)})
  parquet.write_table(table, path)
  rows = dataclasses.replace(config.data, valid_path=str(path))
  assert texts_of(rows, "valid") == texts_of(config.data, "valid")


@pytest.mark.parametrize(
  ("kind", "turns", "beside", "message"),
  [
    (
      llama,
      [{"role": "system", "content": "a"}, *TURNS],
      {},
      "refuses the messages (no system)",
    ),
    (llama, [TURNS[0], *TURNS], {}, "messages (roles must alternate)"),
    (
      chatml,
      [{"role": "user", "content": "a<|im_end|>"}, TURNS[1]],
      {},
      "a message holds '<|im_end|>', which would be taken for the special",
    ),
    (
      chatml,
      TURNS,
      {"chat_template.jinja": "{{ messages[-1].content }}"},
      "writes message 2 differently",
    ),
    (
      chatml,
      TURNS,
      {"chat_template.jinja": "{{ messages.__class__.__mro__ }}"},
      "refuses the messages (access to attribute",
    ),
  ],
)
def test_what_a_template_refuses_is_named(opened, kind, turns, beside, message):
  config = opened(kind, [TURNS, turns], beside)
  with pytest.raises(ConfigError) as caught:
    _ = Splits(config.data).train
  assert message in str(caught.value)
  line = 1 if beside else 2
  assert str(caught.value).startswith(f"{config.data.path}, line {line}: ")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("beside", "message"),
  [
    ({"chat_template.jinja": "{% for %}"}, "the chat template is damaged ("),
    ({"chat_template.jinja": ""}, "has no chat template, which messages need"),
    (
      {
        "chat_template.jinja": None,
        "tokenizer_config.json": {"eos_token": "</s>", "chat_template": [{}]},
      },
      "has none called 'default'",
    ),
  ],
)
def test_templates_that_cannot_be_used_are_named(opened, beside, message):
  config = opened(chatml, beside=beside)
  with pytest.raises(ConfigError) as caught:
    _ = Splits(config.data).train
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_messages_need_jinja(opened, monkeypatch):
  monkeypatch.setitem(sys.modules, "jinja2", None)
  with pytest.raises(ConfigError, match=r"messages need Jinja \(.*\[chat\]'"):
    _ = Splits(opened(chatml).data).train


def test_a_template_belongs_to_the_tokenizer(opened, tmp_path):
  """Another one is another corpus, and a run keeps a copy of its own."""
  config = opened(chatml)
  corpus = data.open(config)
  before = corpus.inputs("train")
  assert "chat_template.jinja" in corpus.tokenizer_files()
  path = tmp_path / "tokenizer" / "chat_template.jinja"
  path.write_text(CHATML.replace("<|im_end|>\n", "<|im_end|>"))
  after = data.open(config).inputs("train")
  for field in ("data.tokenizer", "data.path"):
    assert before[field] != after[field]


def test_a_prompt_has_the_tokens_that_it_has_alone(save):
  """No token reaches into the answer, which has no space of its own."""
  made, _ = llama()
  loaded = tokenizer.load(save(made, {}))
  made = train_bpe.train(["a quick brown fox"] * 9, 290)
  merging = tokenizer.FileTokenizer(
    made, tokenizer.specials.Specials("<bos>", "<eos>", "<pad>", "")
  )
  for each, prompt, answer in [
    (loaded, "a ", "fox"),
    (loaded, "a", " fox"),
    (merging, "a qui", "ck"),
    (merging, "a quick", " brown"),
  ]:
    text = prompt + answer
    borders = ((len(prompt), len(text)),)
    example = Example(text, borders, len(answer), is_chat=False)
    encoded = encoding.encode(example, each)
    ((start, stop),) = encoded.learned
    assert stop == len(encoded.tokens_T)
    np.testing.assert_array_equal(
      encoded.tokens_T[:start], [each.bos_id, *each.encode(prompt)]
    )
    assert each.decode(encoded.tokens_T.tolist()) == text
  assert len(merging.encode("quick")) < len(merging.encode("qui")) + 2
