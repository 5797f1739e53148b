"""A hundred damaged folders and files: one line for each, and no more harm.

Nothing that a file claims is allocated before it is there, and nothing that it
holds is executed.
"""

import json
import shutil
import struct
import sys
import tracemalloc

import numpy as np
import pytest
from safetensors import numpy as safetensors

from tests.interop.pretrained.gguf_files import write as write_gguf
from tests.runs.saved_steps import peak, start_peak
from ultramem_jax import interop, testing
from ultramem_jax.settings.errors import ConfigError

GOLDEN = testing.ROOT / "tests" / "goldens" / "hf" / "llama_gqa_tied"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONTENT = (GOLDEN / FILE).read_bytes()
HEADER = int.from_bytes(CONTENT[:8], "little")
HELD = safetensors.load_file(GOLDEN / FILE)
CONFIG = json.loads((GOLDEN / "config.json").read_text())
MATRIX = "model.layers.0.self_attn.q_proj.weight"
# Beside a file, Python may hold what it knows of tensors, and JSON.
SPARE_BYTES = 2**22
EXECUTED = ("os.system", "os.exec", "subprocess.Popen", "pickle.find_class")


def truncated():
  ends = [0, 1, 7, 8, 9, 64, HEADER // 2, HEADER, HEADER + 7, HEADER + 8]
  ends += [
    HEADER + 8 + i * (len(CONTENT) - HEADER - 8) // 10 for i in range(10)
  ]
  return {f"to {end}": CONTENT[:end] for end in ends}


def with_header(header, data=bytes(64)):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + data


def headers():
  good = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
  changes = {
    "dtype": ["F99", 3, None],
    "shape": [[-4], [2**62, 2**62], [1.5], "4", [2**40]],
    "data_offsets": [[16, 0], [0, 2**60], [-16, 0], ["a", "b"], [0], None],
  }
  cases = {
    f"{field} {value}": with_header({"a": {**good, field: value}})
    for field, values in changes.items()
    for value in values
  }
  for length in (0, HEADER + len(CONTENT), 99_999_999, 2**31, 2**40, 2**64 - 1):
    cases[f"length {length}"] = struct.pack("<Q", length) + CONTENT[8:]
  deep = b"[" * 10_000 + b"]" * 10_000
  for name, text in (("list", b"[]"), ("deep", deep), ("word", b"null")):
    cases[f"header {name}"] = with_header(text)
  for place in range(9, HEADER, HEADER // 6):
    content = CONTENT[:place] + b"\xff" + CONTENT[place + 1 :]
    cases[f"byte {place}"] = content
  return cases


def tensors():
  matrix = HELD[MATRIX]
  cases = {
    f"without {name}": {k: x for k, x in HELD.items() if k != name}
    for name in list(HELD)[::4]
  }
  changed = {
    "turned": matrix.T.copy()[:-1],
    "a row more": np.concatenate([matrix, matrix[:1]]),
    "no rows": matrix[:0],
    "one number": np.ones((), np.float32),
    "an axis more": matrix[None],
    "int64": matrix.astype(np.int64),
    "int8": matrix.astype(np.int8),
    "bool": matrix.astype(bool),
    "uint8": matrix.astype(np.uint8),
    "nan": np.full_like(matrix, np.nan),
    "inf": np.full_like(matrix, -np.inf),
  }
  cases |= {name: {**HELD, MATRIX: x} for name, x in changed.items()}
  cases["one more"] = {**HELD, "model.layers.9.mlp.bias": matrix}
  return {name: safetensors.save(held) for name, held in cases.items()}


def folder_with(folder, name, content):
  """A copy of the golden with this content of a file; None: without it."""
  shutil.copytree(GOLDEN, folder)
  (folder / name).unlink(missing_ok=True)
  if name == INDEX:
    (folder / FILE).rename(folder / "part.safetensors")
  if content is not None:
    (folder / name).write_bytes(content)
  return folder


def indices():
  places = dict.fromkeys(HELD, "part.safetensors")
  other = {"x": "part.safetensors"}
  cases = {
    f"place {place!r}": {"weight_map": {**places, "x": place}}
    for place in (
      *("../part.safetensors", "/etc/passwd", "a/../../part.safetensors"),
      *("", ".", "..", "none.safetensors", "a\0b", "x" * 5000, 7),
    )
  }
  cases |= {"no map": {}, "list": {"weight_map": list(HELD)}}
  cases |= {"surplus": {"weight_map": places | other}}
  cases |= {"too few": {"weight_map": other}}
  return {name: json.dumps(x).encode() for name, x in cases.items()}


def configs():
  text = json.dumps(CONFIG)
  cases = {
    "absent": None,
    "empty": b"",
    "half": text[: len(text) // 2].encode(),
    "list": b"[1]",
    "deep": b"[" * 10_000,
    "bytes": bytes(range(256)),
  }
  changes = {
    "architectures": [["GPT2LMHeadModel"], None, [], {"a": 1}],
    "num_hidden_layers": [10**9, 2**70, -1, "2"],
    "hidden_size": [2**62, 33, 0],
    "vocab_size": [10**12],
    "auto_map": [{"AutoModelForCausalLM": "evil.Model"}],
    "rope_parameters": [{"rope_type": "dynamic"}, {"rope_theta": 10**400}],
  }
  for field, values in changes.items():
    for value in values:
      changed = json.dumps({**CONFIG, field: value}).encode()
      cases[f"{field} {str(value)[:20]}"] = changed
  return cases


def gguf_files(tmp_path):
  content = write_gguf(tmp_path / "good.gguf", "qwen3").read_bytes()
  size = len(content)
  cases = {
    f"to {end}": content[:end]
    for end in (0, 3, 4, 8, 16, 23, 24, 100, 900, size // 2, size - 9)
  }
  numbers = {"version": (4, "<I"), "tensors": (8, "<Q"), "fields": (16, "<Q")}
  for name, (place, form) in numbers.items():
    number = struct.pack(form, 2**31 - 1)
    changed = content[:place] + number + content[place + len(number) :]
    cases[f"{name} many"] = changed
  word = content.index(b"general.architecture") - 8
  cases["long name"] = (
    content[:word] + struct.pack("<Q", 2**40) + content[word + 8 :]
  )
  tokens = content.index(b"tokenizer.ggml.tokens") + 21
  long_list = struct.pack("<IIQ", 9, 8, 2**40)
  cases["long list"] = content[:tokens] + long_list + content[tokens + 16 :]
  numbers_list = struct.pack("<IIQ", 9, 0, 2**40)
  cases["many numbers"] = (
    content[:tokens] + numbers_list + content[tokens + 16 :]
  )
  return cases


watching = []  # the events since the watch began, if it has


def watch(event, _):
  if watching and event.startswith(EXECUTED):
    watching.append(event)


def refused(path, size):
  """The message with which a model is refused; no more may happen."""
  watching.append("begin")
  tracemalloc.start()
  try:
    with pytest.raises(ConfigError) as error:
      interop.from_pretrained(path)
    allocated = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
    events = watching[1:]
    watching.clear()
  assert not events and allocated < size + SPARE_BYTES, allocated
  message = str(error.value)
  assert "\n" not in message and len(message) < 6000
  return message


@pytest.fixture(scope="module", autouse=True)
def hook():
  sys.addaudithook(watch)  # stays until the process ends


def cases_of_folders():
  return [
    *((FILE, f"{FILE}: {name}", x) for name, x in truncated().items()),
    *((FILE, f"{FILE}: {name}", x) for name, x in headers().items()),
    *((FILE, f"{FILE}: {name}", x) for name, x in tensors().items()),
    *((INDEX, f"{INDEX}: {name}", x) for name, x in indices().items()),
    *(("config.json", f"config.json: {n}", x) for n, x in configs().items()),
  ]


def test_folders(tmp_path):
  cases = cases_of_folders()
  assert len(cases) >= 100
  interop.from_pretrained(GOLDEN)  # what is loaded once
  before = start_peak()
  for number, (name, case, content) in enumerate(cases):
    folder = folder_with(tmp_path / str(number), name, content)
    try:
      message = refused(folder, len(CONTENT))
    except BaseException as error:
      error.add_note(case)
      raise
    assert str(folder) in message, case
  # What no hook of Python sees.
  assert peak() - before < 2**26


def test_gguf_files(tmp_path):
  path = tmp_path / "model.gguf"
  for case, content in gguf_files(tmp_path).items():
    path.write_bytes(content)
    try:
      assert refused(path, len(content)).startswith(f"{path}: ")
    except BaseException as error:
      error.add_note(case)
      raise
