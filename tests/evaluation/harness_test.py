"""Tasks of lm-evaluation-harness, of one's own and without a network."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from ultramem_jax import testing
from ultramem_jax.runs import checkpoint, workdir
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.sampling import Sampling

needs_harness = pytest.mark.skipif(
  importlib.util.find_spec("lm_eval") is None,
  reason="lm_eval is not installed: pip install -e '.[tasks]'",
)

NUM_TOKENS, STOP = 12, "e"
QUESTIONS = [
  {
    "question": f"What comes after {i}?",
    "label": i % 3,
    "choices": [str(i), f"{i + 1}, as all know", "nothing " * (1 + i % 3)],
  }
  for i in range(15)
]
TEXTS = [{"text": "words in a row, " * i} for i in range(1, 6)]
PROMPTS = [{"prompt": f"say {i}:  "} for i in range(8)]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
"""
TASKS = {
  "my_choice": (
    QUESTIONS,
    """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
""",
  ),
  "my_text": (
    TEXTS,
    """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
  ),
  "my_writing": (
    PROMPTS,
    f"""
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["{STOP}"], max_gen_toks: {NUM_TOKENS}}}
metric_list: [{{metric: exact_match}}]
""",
  ),
}


@pytest.fixture(scope="module")
def folder(slow, tmp_path_factory):
  """A workdir, run/, and the YAML files of TASKS, tasks/."""
  folder = tmp_path_factory.mktemp("harness")
  run = slow.run
  workdir.claim(folder / "run", run.config, "nothing")
  with checkpoint.Checkpointer(folder / "run", keep=1) as checkpointer:
    checkpointer.save(run.step, run.variables, {}, None)
  # Every other answer is right.
  for number, prompt in enumerate(PROMPTS):
    text = slow.continue_text(prompt["prompt"], NUM_TOKENS, STOP)
    prompt["answer"] = text + "!" * (number % 2)
  (folder / "tasks").mkdir()
  for name, (documents, task) in TASKS.items():
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    (folder / "tasks" / f"{name}.yaml").write_text(
      TASK.format(name=name, data=data) + task
    )
  return folder


def evaluate(folder, tmp_path, *flags):
  """Runs eval.py: (status, stdout, stderr)."""
  return testing.finish(
    testing.start(
      [
        "eval.py",
        f"--workdir={folder / 'run'}",
        f"--tasks_dir={folder / 'tasks'}",
        *flags,
      ],
      HF_HUB_OFFLINE="1",
      HF_HOME=str(tmp_path / "hf"),
    )
  )


def accuracy(slow):
  def likeliest(question):
    context = f"Question: {question['question']}\nAnswer:"
    return np.argmax(
      [
        slow.score_pair(context, f" {choice}")[0]
        for choice in question["choices"]
      ]
    )

  return np.mean([likeliest(q) == q["label"] for q in QUESTIONS])


def bits_per_byte(slow):
  """Scores documents in windows, of which the last is full if it can be."""
  nats, size = 0.0, 0
  for text in (document["text"] for document in TEXTS):
    tokens = [slow.bos, *text.encode()]
    for start in range(1, len(tokens), slow.length):
      end = min(start + slow.length, len(tokens))
      first = max(0, end - slow.length - 1)
      nats -= slow.score(tokens[first:end], end - start)[0]
    size += len(text.encode())
  return nats / np.log(2) / size


@needs_harness
def test_tasks_score_what_slow_computations_do(folder, slow, tmp_path):
  status, output, errors = evaluate(
    folder, tmp_path, "--tasks=my_*", "--batch_size=3"
  )
  assert status == 0, errors
  (line,) = (folder / "run" / "tasks.jsonl").read_text().splitlines()
  record = json.loads(line)
  assert record["step"] == 7 and record["limit"] is None
  assert record["n-shot"] == {name: 0 for name in TASKS}
  results = record["results"]
  assert results["my_choice"]["acc,none"] == pytest.approx(accuracy(slow))
  assert results["my_text"]["bits_per_byte,none"] == pytest.approx(
    bits_per_byte(slow), rel=1e-5
  )
  assert results["my_writing"]["exact_match,none"] == 0.5
  for name in TASKS:
    assert f"|{name}" in output
  # Another evaluation is another line.
  status, _, errors = evaluate(
    folder, tmp_path, "--tasks=my_choice", "--limit=5", "--num_fewshot=2"
  )
  assert status == 0, errors
  lines = (folder / "run" / "tasks.jsonl").read_text().splitlines()
  assert lines[0] == line and len(lines) == 2
  record = json.loads(lines[1])
  assert record["limit"] == 5 and record["n-shot"] == {"my_choice": 2}
  assert record["n-samples"]["my_choice"]["effective"] == 5


@needs_harness
@pytest.mark.parametrize(
  "flags, expected",
  [
    (
      ["--tasks=my_choise"],
      "--tasks = 'my_choise': no such task; nearest: my_choice",
    ),
    (
      ["--tasks=my_text", "--tasks_dir=/nowhere"],
      "--tasks_dir = '/nowhere': no such directory",
    ),
  ],
)
def test_what_is_not_there_is_told_in_a_line(folder, flags, expected, tmp_path):
  status, _, errors = evaluate(folder, tmp_path, *flags)
  assert status == 2
  assert errors.startswith(f"error: {expected}") and errors.count("\n") == 1


def test_without_the_harness_a_line_says_how_to_get_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  monkeypatch.delitem(
    sys.modules, "ultramem_jax.evaluation.harness", raising=False
  )
  with pytest.raises(ConfigError, match=r"pip install -e '\.\[tasks\]'"):
    importlib.import_module("ultramem_jax.evaluation.harness")


@needs_harness
def test_generation_settings():
  from ultramem_jax.evaluation import harness

  assert harness.sampling({}) == ((), Sampling(256, 0.0, 0, 1.0))
  neutral = {**harness.NEUTRAL, "temperature": None, "seed": 7}
  assert harness.sampling(neutral) == harness.sampling({})
  assert harness.sampling(
    {
      "until": "\n",
      "do_sample": False,
      "temperature": 0.7,
      "max_gen_toks": 9,
      "num_beams": 1,
    }
  ) == (("\n",), Sampling(9, 0.0, 0, 1.0))
  assert harness.sampling(
    {
      "until": [".", "\n"],
      "do_sample": True,
      "temperature": 0.7,
      "top_p": 0.9,
      "top_k": 5,
      "max_new_tokens": 3,
    }
  ) == ((".", "\n"), Sampling(3, 0.7, 5, 0.9))
  for settings, expected in [
    ({"num_beams": 4}, "not supported: num_beams"),
    ({"typical_p": 0.5}, "not supported: .*typical_p"),
    ({"top_p": 2.0}, "top_p = 2.0: must lie in"),
    ({"until": 3}, "until must be a string or a list of strings"),
    ({"until": [3]}, "until must be a string or a list of strings"),
    ({"until": {}}, "until must be a string or a list of strings"),
    ({"until": False}, "until must be a string or a list of strings"),
    ({"do_sample": {"a": 1}}, "do_sample must be true or false"),
    ({"seed": []}, "seed must be an integer"),
  ]:
    with pytest.raises(ConfigError, match=expected):
      harness.sampling(settings)
