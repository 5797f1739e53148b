"""The commands of `python -m ultramem_jax COMMAND`, a module each.

A module's docstring is the command's help. It has `define_flags()` and
`main(...)`, whose parameters are the command's positional arguments.
"""

# What each command does; `train-bpe` is the module train_bpe.
SUMMARIES = {
  "accounting": "count a model's parameters, FLOPs, memory access and bytes",
  "compile": "compile a run's steps for devices that need not be here",
  "convert": "convert a TFRecord dataset to ArrayRecord",
  "count": "count how often text reads the rows of a model's tables",
  "export": "write a run's model as a Hugging Face folder",
  "generate": "continue prompts with a trained model",
  "import": "turn a pretrained Hugging Face model into a run",
  "merge-lora": "copy a run, with its LoRA merged into the weights",
  "patch": "take what a fine-tuning learned as a patch, apply or revert it",
  "quantize": "copy a run, with int8 or bfloat16 tables",
  "train-bpe": "train a tokenizer on the text of a config",
}
