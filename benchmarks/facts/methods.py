"""The methods that are compared: settings of a run, and nothing else.

A memory comes into the model in a run of its own, the base, with the backbone
frozen: without any learning (cold), or after many steps on general text (warm)
or on facts about others (taught). What learns the facts begins there.
"""

import dataclasses

from benchmarks.facts.memory import (
  EARLY_PLACES,
  PRODUCT_KEYS,
  SIX_PLACES,
  TAUGHT,
  TEN_PLACES,
  THREE_PLACES,
  WARM,
  Memory,
  Overrides,
)
from ultramem_jax.settings.model import ModelConfig
from ultramem_jax.tools import accounting

EVERY_MEMORY = "memory"
ONLY_VALUES = "memory_.*values"
PIECES = "{pieces}"
VALUES_AND_GATE = "memory_.*(values|gating)"
# Texts whose reads of a base's rows are counted.
GENERAL, OTHERS = "general", "others"


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to teach facts.

  label: in tables.
  rates: the learning rates that are tried.
  memory: that it adds; None: it adds none.
  overrides: other fields of the run on facts.
  counts: the texts whose reads of the base's rows it needs: `GENERAL`, which
    is the base's own text; `OTHERS`, facts about others.
  times_counted: how many times as much general text it counts as others do.
  protects: whether what was taught is counted with these texts, so that rows
    that earlier sets read are chosen for later ones less likely, or never.
  dense_as: a memory in whose place it adds what `dense` says.
  """

  label: str
  rates: tuple[float, ...]
  memory: Memory | None = None
  overrides: Overrides = dataclasses.field(default_factory=dict)
  counts: tuple[str, ...] = ()
  times_counted: int = 1
  protects: bool = False
  dense_as: Memory | None = None


def dense(model: ModelConfig) -> Overrides:
  """Returns the fields of adapters in place of the memories of a model.

  They stand where the memories do, and a token takes as many parameters of them
  as of the memories, rows that it reads included.
  """
  costs = accounting.flops_per_token(model)
  flops = sum(x for part, x in costs.items() if part.startswith("memory"))
  matrices = 3 if model.activation == "swiglu" else 2
  flops_of_width = 2 * matrices * model.embed_dim * len(model.spans)
  return {
    "model.adapter_dim": round(flops / flops_of_width),
    "model.adapter_blocks": "/".join(f"{x.start + 1}" for x in model.spans),
  }


def lora(rank: int, targets: str) -> Overrides:
  """Returns the fields of a LoRA that is trained alone."""
  return {
    "optim.trainable": "lora_",
    "model.lora.rank": rank,
    "model.lora.alpha": 2.0 * rank,
    "model.lora.targets": targets,
  }


def with_pieces(overrides: Overrides, path: str) -> Overrides:
  """Returns fields with the path of the general text in place of `PIECES`."""
  return {
    field: value.replace(PIECES, path) if isinstance(value, str) else value
    for field, value in overrides.items()
  }


EVERYWHERE = "attention/(query|value)|mlp/(up|down)"
# The whole memory learns, as if it were a part of the model like any other.
NAIVE = {"optim.trainable": EVERY_MEMORY}
VALUES = {
  "optim.trainable": ONLY_VALUES,
  "optim.weight_decay": 0.0,
  "optim.value_lr_multiplier": 1.0,
}
# Keys, queries and projections follow, at a rate that is right for them.
WHOLE = {
  "optim.trainable": EVERY_MEMORY,
  "optim.weight_decay": 0.0,
  "optim.value_lr_multiplier": 300.0,
}
CHOSEN = {"optim.table_rows": "tfidf", "optim.table_top_t": 512}
# `PIECES` stands for the file of pieces of general text.
MIXED = {"data.mixture": f"{PIECES}=0.25"}
# What the model says without its memory is half of what it is to say.
GUARDED = {**MIXED, "optim.distillation": 0.5}
# How a base is taught facts about others.
TAUGHT_RATE, TAUGHT_OVERRIDES = 3e-3, {**WHOLE, **MIXED}
TAUGHT_MEMORY = Memory(places=TEN_PLACES, num_keys=256, base=TAUGHT)
CHOSEN_BY_KL = {"optim.table_rows": "kl", "optim.table_top_t": 1024}
# In the first blocks it reads little else than the tokens, three at a time. A
# token reads few rows of many, most of which nothing else reads.
NAMES_MEMORY = Memory(
  kind=PRODUCT_KEYS,
  places=EARLY_PLACES,
  reads=(1 / 30, 2 / 30, 3 / 30),
  query_conv=3,
  num_keys=768,
  top_m=4,
)
SPARED = {
  "optim.table_rows": "tfidf",
  "optim.table_top_t": 2**20,
  "optim.table_max_share": 0.0,
}
SMALL_MOMENTS = {
  "optim.table_moments": "bfloat16",
  "optim.table_second_moment": "row",
}
RATES = (1e-3, 3e-3, 1e-2)
# With general text mixed in, most tokens of a batch are of no answer.
MIXED_RATES = (3e-3, 1e-2, 3e-2)
VALUE_RATES = (1e-1, 3e-1, 1.0)
SPARED_RATES = (1.0, 4.0, 16.0)

METHODS = {
  "untouched": Method("untouched model", (0.0,)),
  "full": Method("full fine-tuning", (1e-5, 3e-5, 1e-4)),
  "full_mixed": Method(
    "full fine-tuning, general text mixed in", (3e-5, 1e-4, 3e-4), None, MIXED
  ),
  "lora_4": Method(
    "LoRA, rank 4", (3e-4, 1e-3, 3e-3), None, lora(4, EVERYWHERE)
  ),
  "lora_16": Method(
    "LoRA, rank 16", (3e-4, 1e-3, 3e-3), None, lora(16, EVERYWHERE)
  ),
  "lora_16_mixed": Method(
    "LoRA, rank 16, general text mixed in",
    RATES,
    None,
    {**lora(16, EVERYWHERE), **MIXED},
  ),
  # The same place and the same work, without a table.
  "dense_mlp": Method(
    "adapter as large as what is read of Memory+, one place",
    RATES,
    overrides={"optim.trainable": "adapter"},
    dense_as=Memory(),
  ),
  "dense_mlp_mixed": Method(
    "adapters as large as what is read of Memory+, ten places, general text "
    "mixed in",
    MIXED_RATES,
    overrides={"optim.trainable": "adapter", **MIXED},
    dense_as=Memory(places=TEN_PLACES),
  ),
  # Memories as they were first tried: cold, and all of them is trained.
  "memory_plus_1": Method(
    "Memory+, one place", RATES, Memory(output="zero"), NAIVE
  ),
  "memory_plus_3": Method(
    "Memory+, three places",
    RATES,
    Memory(places=THREE_PLACES, output="zero"),
    NAIVE,
  ),
  "ultramem_1": Method(
    "UltraMem, one place", RATES, Memory(kind="ultramem", output="zero"), NAIVE
  ),
  "ultramem_3": Method(
    "UltraMem, three places",
    RATES,
    Memory(kind="ultramem", places=THREE_PLACES, output="zero"),
    NAIVE,
  ),
  "gated": Method(
    "Memory+, one place, gate",
    RATES,
    Memory(output="plain", gate="input"),
    NAIVE,
  ),
  # Only the values of a memory that is empty at first: its keys, queries and
  # projection stay as they were drawn, or as general text has made them.
  "values": Method("Memory+, only values learn", VALUE_RATES, Memory(), VALUES),
  "values_3": Method(
    "Memory+, only values learn, three places",
    VALUE_RATES,
    Memory(places=THREE_PLACES),
    VALUES,
  ),
  "values_early": Method(
    "Memory+, only values learn, three early places",
    VALUE_RATES,
    Memory(places=EARLY_PLACES),
    VALUES,
  ),
  "values_early_guarded": Method(
    "Memory+, only values learn, three early places, general text mixed in, "
    "and half of the loss is what the model says without its memory",
    VALUE_RATES,
    Memory(places=EARLY_PLACES),
    {**VALUES, **GUARDED},
  ),
  "values_early_mixed": Method(
    "Memory+, only values learn, three early places, general text mixed in",
    VALUE_RATES,
    Memory(places=EARLY_PLACES),
    {**VALUES, **MIXED},
  ),
  "whole_early_mixed": Method(
    "Memory+, all of it learns, three early places, general text mixed in",
    RATES,
    Memory(places=EARLY_PLACES),
    {**WHOLE, **MIXED},
  ),
  "whole_six_mixed": Method(
    "Memory+, all of it learns, six places, general text mixed in",
    RATES,
    Memory(places=SIX_PLACES),
    {**WHOLE, **MIXED},
  ),
  "whole_ten_mixed": Method(
    "Memory+, all of it learns, ten places, general text mixed in",
    RATES,
    Memory(places=TEN_PLACES),
    {**WHOLE, **MIXED},
  ),
  # Its queries see the last five tokens of the block's input: most of a name.
  "ultramem_early_mixed": Method(
    "UltraMem, all of it learns, three early places, general text mixed in",
    RATES,
    Memory(kind="ultramem", places=EARLY_PLACES),
    {**WHOLE, **MIXED},
  ),
  "chosen": Method(
    "Memory+, chosen rows",
    VALUE_RATES,
    Memory(),
    {**VALUES, **CHOSEN},
    counts=(GENERAL,),
  ),
  "chosen_3": Method(
    "Memory+, chosen rows, three places",
    VALUE_RATES,
    Memory(places=THREE_PLACES),
    {**VALUES, **CHOSEN},
    counts=(GENERAL,),
  ),
  # General text leaves more of a larger table alone.
  "chosen_3_large": Method(
    "Memory+, chosen rows of 65,536, three places",
    VALUE_RATES,
    Memory(places=THREE_PLACES, num_keys=256),
    {**VALUES, **CHOSEN, "optim.table_top_t": 4096},
    counts=(GENERAL,),
  ),
  "chosen_ten": Method(
    "Memory+, chosen rows of 65,536, ten places",
    VALUE_RATES,
    Memory(places=TEN_PLACES, num_keys=256),
    {**VALUES, **CHOSEN, "optim.table_top_t": 4096},
    counts=(GENERAL,),
  ),
  "taught_ten_chosen": Method(
    "Memory+ that was taught facts about others, chosen rows of 65,536, ten "
    "places",
    VALUE_RATES,
    TAUGHT_MEMORY,
    {**VALUES, **CHOSEN_BY_KL},
    counts=(OTHERS,),
  ),
  # One set leaves another's rows alone: what it reads, and nothing else does.
  # Queries that see three tokens tell names apart, whatever is before them.
  "spared_names": Method(
    "product keys of three tokens, of 589,824 rows in each of three early "
    "places only those that nothing else reads",
    SPARED_RATES,
    NAMES_MEMORY,
    {**VALUES, **SPARED},
    counts=(GENERAL, OTHERS),
    protects=True,
  ),
  # More text is counted, and less of a larger table is read by each token: so
  # that text which was not counted seldom reads a row that was updated.
  "spared_names_large": Method(
    "product keys of three tokens, of 1,048,576 rows in each of three early "
    "places only those that nothing else reads, in 16 times as much text",
    SPARED_RATES,
    dataclasses.replace(NAMES_MEMORY, num_keys=1024, top_m=2),
    {**VALUES, **SPARED, **SMALL_MOMENTS},
    counts=(GENERAL, OTHERS),
    times_counted=16,
    protects=True,
  ),
  "warm": Method(
    "Memory+, warm, only values learn", VALUE_RATES, Memory(base=WARM), VALUES
  ),
  # What a warm memory does to general text before it is taught anything is kept
  # small. All of the loss would teach an empty memory nothing.
  "warm_distilled": Method(
    "Memory+, warm and distilled, only values learn",
    VALUE_RATES,
    Memory(base=WARM, distillation=0.5),
    VALUES,
  ),
  "warm_chosen": Method(
    "Memory+, warm, chosen rows",
    VALUE_RATES,
    Memory(base=WARM),
    {**VALUES, **CHOSEN},
    counts=(GENERAL,),
  ),
  "values_gated": Method(
    "Memory+, only values and a gate learn, general text mixed in",
    VALUE_RATES,
    Memory(gate="input"),
    {**VALUES, **MIXED, "optim.trainable": VALUES_AND_GATE},
  ),
  "mixed": Method(
    "Memory+, only values learn, general text mixed in",
    VALUE_RATES,
    Memory(),
    {**VALUES, **MIXED},
  ),
}

# Those that are compared if none are named: what people do without a memory,
# each with and without general text, and the memories that came out best.
COMPARED = (
  "untouched",
  "full",
  "full_mixed",
  "lora_16",
  "lora_16_mixed",
  "dense_mlp_mixed",
  "values_early",
  "values_early_mixed",
  "whole_early_mixed",
  "whole_six_mixed",
  "whole_ten_mixed",
  "chosen_ten",
)
