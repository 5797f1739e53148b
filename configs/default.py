"""Every knob, with its meaning, unit and range.

A variant imports this file, calls `get_config()` and overrides a few fields.
The command line overrides any field, too:

  python train.py --config=configs/tiny.py --config.steps=200

A comment stands beside its field, or above it where it needs more room.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> Any:
  """Returns the ConfigDict of a small dense model."""
  c = ConfigDict()
  c.seed = 0  # of parameters, data order and dropout; below 2^32
  # Two runs give the same bits on a GPU, too, where sums are then slower; on
  # CPUs and TPUs they always do.
  c.deterministic = False
  # A workdir, or workdir@step: a new run begins with its parameters of the same
  # path and shape, and a new optimizer; "" = all are new.
  c.init_from = ""
  # A regular expression: parameters in whose path it is found are not taken
  # from init_from, but start anew.
  c.init_skip = ""
  c.steps = 1000  # optimizer steps of the whole run
  # Sequences per step, over all devices and processes; less than 2^31 tokens.
  c.batch_size = 8
  # Parts that a batch is cut into, one after the other, to save memory; must
  # divide batch_size.
  c.accumulation_steps = 1
  c.log_every = 10  # steps between records in the logs
  # Steps between validations; there is always one after the last step.
  c.eval_every = 1000
  c.eval_batches = 0  # batches per validation; 0 = the whole validation set

  # Data: text -> tokens -> rows of seq_len tokens.
  c.data = ConfigDict()
  # stdlib (the source code of the Python that runs) | text (files of
  # yours) | tfds (TensorFlow Datasets).
  c.data.source = "stdlib"
  # text: a file, a glob or a folder (all text below it). Text in UTF-8 is a
  # document a file; .jsonl, .jsonlines and .ndjson a document a line, and .json
  # if its first lines are records (text_field, or what data.records needs);
  # .parquet and .arrow a document a row, as in the folder of a dataset that
  # save_to_disk of Hugging Face wrote. .gz, .zst, .bz2 and .xz are unpacked.
  c.data.path = ""
  # text: the files to validate on, in the same way; "" = hold out a part of
  # `path`.
  c.data.valid_path = ""
  # PATH=SHARE joined by ",", such as facts.jsonl=0.3,books=0.2: these shares of
  # the documents to train on are drawn from further files, the rest from
  # `source`. Nothing of them is held out.
  c.data.mixture = ""
  # Share of documents held out for validation, chosen by a hash, where the
  # source has no validation split; strictly between 0 and 1. From a single text
  # file the last part is held out; lines of JSON are not cut.
  c.data.valid_fraction = 0.04
  c.data.tfds_name = ""  # tfds: name[/config][:version], such as c4/en:3.0.1
  c.data.tfds_dir = ""  # tfds: data directory; "" = ~/tensorflow_datasets
  c.data.train_split = "train"  # tfds: split to train on; slices are allowed
  c.data.valid_split = "validation"  # tfds: split to validate on
  # JSON lines, Parquet and tfds: the field that holds the text.
  c.data.text_field = "text"
  # What JSON lines and rows of Parquet are: text (in text_field) | answers
  # (prompt and answer, or messages, of which only the answers are learned; or
  # text).
  c.data.records = "text"
  # bytes | path of a Hugging Face tokenizer.json, or of its folder.
  c.data.tokenizer = "bytes"
  # Names of the tokens that begin and end a document, and that pad; "" = as the
  # tokenizer declares them.
  c.data.bos_token = ""
  c.data.eos_token = ""
  c.data.pad_token = ""
  c.data.seq_len = 1024  # [T] tokens per row
  # segments (a row packs documents; attention and positions stay inside each) |
  # concat (documents run on without a border, as in the paper's training) |
  # examples (one document a row, then padding).
  c.data.packing = "segments"
  # Documents longer than a row, with packing = "examples": refuse | cut (drop
  # the end).
  c.data.long_examples = "refuse"
  # Longest document in bytes when training: longer text files are cut, so that
  # one file does not fill a row of the batch for many steps; 0 = no limit.
  c.data.cut_bytes = 0
  # Documents that are shuffled together where the source is a stream
  # (TFRecord); the other sources shuffle all documents.
  c.data.shuffle_window = 10000
  # Batches that a thread prepares ahead, at most 1000; 0 = no thread.
  c.data.prefetch = 2

  # Model: a causal transformer with rotary positions.
  c.model = ConfigDict()
  c.model.vocab_size = 264  # [V] at least the tokenizer's (bytes: 259)
  c.model.embed_dim = 256  # [D] width of the residual stream
  c.model.num_layers = 4  # [L] transformer blocks, at most 4096
  c.model.num_heads = 4  # [Q] attention heads; D / Q must be even
  # [q] heads of keys and values, each shared by Q / q attention heads; the
  # cache of decoding holds only these. 0 = Q.
  c.model.num_kv_heads = 0
  c.model.head_dim = 0  # [H] width of an attention head, even; 0 = D / Q
  c.model.mlp_dim = 1024  # [F] hidden width of an MLP
  c.model.activation = "gelu"  # of MLPs and experts: gelu | swiglu
  # Taps of a causal depthwise convolution of what the MLP, experts or memory of
  # a block read; 0 = no convolution.
  c.model.mlp_conv = 0
  # Blocks that have it: "i/j/...", counted from 1, or full.
  c.model.mlp_conv_blocks = "full"
  # Hidden width of an adapter, an MLP beside that of a block, which reads what
  # that reads and adds nothing at first; 0 = none. To train nothing else:
  # optim.trainable = "adapter".
  c.model.adapter_dim = 0
  # Blocks that have one: "i/j/...", counted from 1, or full.
  c.model.adapter_blocks = "full"
  c.model.norm = "layernorm"  # layernorm | rms
  c.model.norm_eps = 1e-5  # added to the variance in norms; [1e-12, 1]
  c.model.norm_bias = False  # norms learn a bias
  # Norms before attention and MLP, or after them: pre | post.
  c.model.norm_position = "pre"
  # Normalize queries and keys: none | head (each head) | width (all heads as
  # one vector).
  c.model.qk_norm = "none"
  c.model.qkv_bias = False  # queries, keys and values have a bias
  c.model.tie_embeddings = False  # the output head is the embedding
  c.model.rope_theta = 10000.0  # base of the rotary wavelengths; at least 1
  c.model.sliding_window = 0  # positions that a token attends to; 0 = all
  # Share of activations that is dropped in embedding, attention, MLP and
  # memory; [0, 1].
  c.model.dropout_rate = 0.0
  # Dtype of matrix products: float32 | bfloat16. Scores, norms, softmaxes and
  # losses are always float32, and so are parameters, apart from tables
  # (storage.table_dtype) and what is frozen (optim.frozen_dtype).
  c.model.dtype = "float32"
  c.model.attention = "xla"  # xla | cudnn (flash attention; GPU, bfloat16)
  # What the backward pass recomputes to save memory: none | block (every
  # block).
  c.model.remat = "none"

  # Longer rotary wavelengths, for longer texts than a model was trained on
  # (ultramem_jax/ops/rotary.py has the formulas).
  c.model.rope_scaling = ConfigDict()
  c.model.rope_scaling.kind = "none"  # none | linear | llama3 | yarn
  c.model.rope_scaling.factor = 1.0  # how much longer texts become; above 0
  # llama3, yarn: positions that the model was trained on.
  c.model.rope_scaling.original_length = 8192
  # llama3, yarn: pairs with at most this many rotations over these positions
  # are slowed by the whole factor,
  c.model.rope_scaling.low_rotations = 1.0
  # those with at least this many not at all. Llama 3 has 4, YaRN 32.
  c.model.rope_scaling.high_rotations = 4.0
  # yarn: take whole pairs as bounds between the two, further apart.
  c.model.rope_scaling.truncate = True
  # Multiplies queries and keys; 0 = 0.1 ln(factor) + 1 with yarn, otherwise 1.
  c.model.rope_scaling.attention_factor = 0.0

  # Mixture of experts in place of the MLP of every block.
  c.model.moe = ConfigDict()
  c.model.moe.num_experts = 0  # [X] experts per block; 0 = plain MLPs
  c.model.moe.top_k = 2  # experts per token; no token is ever dropped
  c.model.moe.expert_dim = 256  # hidden width of an expert
  c.model.moe.balance_loss_weight = 0.01  # of the load-balance loss, per block

  # LoRA: a change of low rank beside matrices of attention, MLPs and head, zero
  # at first. To train nothing else: optim.trainable = "lora_".
  c.model.lora = ConfigDict()
  c.model.lora.rank = 0  # [r] width of the change; 0 = none
  c.model.lora.alpha = 16.0  # the change is multiplied by alpha / rank
  # A regular expression that is searched for in the paths of the matrices, such
  # as attention/(query|key|value|out)|mlp/(gate|up|down)|head.
  c.model.lora.targets = "attention/(query|value)"

  # Memory layer (UltraMem); the paper's symbol in brackets. Where the default
  # is None, each kind has its own (ultramem_jax/settings/kinds.py); the comment
  # gives that of kind "ultramem".
  c.model.memory = ConfigDict()
  # none (a dense model) | ultramem | ultramem_v2 (the memories share one table,
  # a ring of rows) | memory_plus (product keys and a gate; the memories share a
  # table) | peer (every row is a one-neuron expert).
  c.model.memory.kind = "none"
  # Where memories stand, "i:j/i:j/...", blocks counted from 1: each reads in
  # block i and is added after block j. "full" = i:i in every block.
  c.model.memory.spans = ""
  c.model.memory.num_keys = 128  # [n] the table has n^2 rows
  c.model.memory.key_dim = 32  # [D_k / r] width of a key per side and rank
  c.model.memory.value_dim = 128  # [D_v] width of a row; divisible by num_cores
  c.model.memory.top_m = 16  # [m] rows read per head; at most sqrt(E) * n
  c.model.memory.num_heads = 2  # [H] independent key sets over one table
  # Heads that share one query, 1 to H. None: the kind's own (2).
  c.model.memory.heads_per_query = placeholder(int)
  c.model.memory.query_per_rank = True  # each Tucker rank has its own query
  # tucker (TDQKR) | sum (product keys). None: the kind's own (tucker).
  c.model.memory.score = placeholder(str)
  c.model.memory.tucker_rank = 2  # [r] vectors per key with score = tucker
  # [h] cores of multi-core scoring (MCS). None: the kind's own (2).
  c.model.memory.num_cores = placeholder(int)
  # Normalize the m scores of each head, as product-key memory does. None: the
  # kind's own (False).
  c.model.memory.softmax = placeholder(bool)
  # [E] implicit value expansion (IVE), a square. None: the kind's own (4).
  c.model.memory.expansion = placeholder(int)
  # How virtual rows map to physical ones: hash (computed) | permutation (a
  # stored buffer) | none (in order). None: the kind's own (hash).
  c.model.memory.shuffle = placeholder(str)
  # A linear map from D_v to D, needed if E > 1. None: the kind's own (True).
  c.model.memory.value_projection = placeholder(bool)
  # One such map for all rows instead of E of them. None: the kind's own
  # (False).
  c.model.memory.shared_projection = placeholder(bool)
  c.model.memory.query_key_norm = "layernorm"  # layernorm | rms | none
  c.model.memory.norm_eps = 1e-5  # added to the variance in those; [1e-12, 1]
  # Taps of the causal convolution before the query; 0 = no convolution. None:
  # the kind's own (5).
  c.model.memory.query_conv = placeholder(int)
  # paper (calibrated) | official (as in the authors' code). None: the kind's
  # own (paper).
  c.model.memory.init = placeholder(str)
  c.model.memory.aux_loss_weight = 0.001  # [alpha] of Tucker's auxiliary loss
  # [tau] singular values of a core up to this cost nothing.
  c.model.memory.aux_loss_margin = 0.15
  # What a new memory adds: plain (what the init gives) | zero (nothing, as the
  # value projection starts at zero) | empty (nothing, as all values start at
  # zero). The last two leave a finished model as it is when a memory is put
  # into it.
  c.model.memory.output = "plain"
  # A learned factor of what a memory adds: none | scalar (one number) | input
  # (for each token, that number times 2 sigmoid(<w, x> + b)).
  c.model.memory.gate = "none"
  # Where the number starts: zero (a finished model stays as it is) | open (at
  # 1). w and b start at zero.
  c.model.memory.gate_init = "zero"
  # The block in which a memory reads has no MLP of its own.
  c.model.memory.replace_mlp = False
  # Only ultramem_v2 reads these four.
  c.model.memory.share_ratio = 1.0  # share of the ring a memory reaches, (0, 1]
  c.model.memory.ring_layers = 0  # memories on the ring, n^2 rows each; 0 = all
  c.model.memory.pre_value_dim = 0  # width of pre-values; 0 = no pre-values
  c.model.memory.pre_activation = "none"  # of <pre-value, W_pre x>: none | gelu
  # Multiply the pooled values by silu(W_g x); only memory_plus. None: the
  # kind's own (False; True with memory_plus).
  c.model.memory.input_gate = placeholder(bool)

  # Where the tables of the memories lie, and in which form.
  c.model.memory.storage = ConfigDict()
  # How mesh.table_axes split a table: rows (number-wise) | columns
  # (dimension-wise) | rows_pooled, rows_unpooled (rows that are summed before
  # or after they travel) | auto (the way that moves the fewest bytes).
  c.model.memory.storage.partition = "auto"
  # Tables, and the counters of their use, are stored with a multiple of this
  # many rows, so that devices share them evenly; rows beyond n^2 are never
  # read.
  c.model.memory.storage.row_multiple = 1
  # float32 | bfloat16 (rounded at random when updated; needs sparse updates) |
  # int8 (cannot be trained; made by python -m ultramem_jax quantize).
  c.model.memory.storage.table_dtype = "float32"
  # What reads tables: xla | pallas (reads each row once; on a GPU not int8, on
  # a TPU only float32, and not with partition = rows_unpooled; its speed has
  # not been measured).
  c.model.memory.storage.kernel = "xla"

  # What only imported weights have; ultramem_jax/interop sets it.
  c.model.memory.imported = ConfigDict()
  c.model.memory.imported.spare_queries = 0  # queries that no head reads
  c.model.memory.imported.norm_bias = False  # a bias in query and key norm
  c.model.memory.imported.query_bias = False  # a bias in the query projection
  # A bias in the value projection and in the input gate.
  c.model.memory.imported.projection_bias = False
  # Multiply the output by sigmoid(<w, x>); only memory_plus.
  c.model.memory.imported.output_gate = False

  # AdamW.
  c.optim = ConfigDict()
  c.optim.learning_rate = 1e-3  # peak; above 0, at most 1000
  c.optim.warmup_fraction = 0.01  # share of steps with a rising rate, below 1
  # Share of the peak before the first step, from which the warm-up rises.
  c.optim.init_fraction = 0.0
  c.optim.final_fraction = 0.1  # rate at the last step, as a share of the peak
  c.optim.beta1 = 0.9  # decay of the first moments; [0, 0.999999]
  c.optim.beta2 = 0.95  # decay of the second moments; [0, 0.999999]
  c.optim.eps = 1e-8  # added to the root of the second moments; [1e-16, 1]
  c.optim.weight_decay = 0.1  # of weights, keys and value tables
  # Decay biases, weights of norms and the numbers of memories' gates as well.
  c.optim.decay_norms = False
  c.optim.clip_norm = 1.0  # largest norm of the whole gradient; 0 = no limit
  # [k] factor on the rate of value tables before the first step, from which it
  # falls linearly to 1.
  c.optim.value_lr_multiplier = 10.0
  c.optim.value_lr_horizon = 1.0  # share of steps until it is 1; (0, 1]
  # Which rows of value tables a step updates: dense (all) | sparse (those that
  # were read; the others neither decay nor move by their momentum) | auto
  # (sparse where a step reads few of the rows).
  c.optim.table_update = "auto"
  # Moments of value tables: float32 | bfloat16 (rounded at random; needs sparse
  # updates).
  c.optim.table_moments = "float32"
  # Second moments of value tables: element | row (one float32 per row, the mean
  # over it; needs sparse updates).
  c.optim.table_second_moment = "element"
  # How tables are updated: adamw | sgd (no moments; with weight_decay, too).
  c.optim.table_rule = "adamw"
  # Which of the rows that a step reads it updates: all | tfidf, kl (of
  # each table the table_top_t that are most special to the step's batch, as
  # docs/facts.md explains; needs table_counts).
  c.optim.table_rows = "all"
  c.optim.table_top_t = 500  # rows, at least 1
  # How often other text reads each row, as python -m ultramem_jax count writes
  # it: a file, or the workdir that has it.
  c.optim.table_counts = ""
  # Rows that more than this share of the counted texts read are never updated:
  # 0 = no row that any of them reads, 1 = no limit.
  c.optim.table_max_share = 1.0
  c.optim.z_loss = 0.0  # weight of log(sum exp logits)^2 in the loss
  # [w] share of the loss, in [0, 1], that keeps a model to what it says without
  # its memories: (1 - w) cross entropy + w KL(without || with). Then only
  # memories may be trained (docs/pretrained.md).
  c.optim.distillation = 0.0

  # What is trained: all | a regular expression that is searched for in the
  # paths of parameters, such as memory, memory_.*/values, head|embed. The
  # others stay as they are, without gradient, moments or decay.
  c.optim.trainable = "all"
  # Dtype of the parameters that are not trained, in memory and in the workdir's
  # frozen/: float32 | bfloat16, rounded when a run begins. Norms, routers and
  # memories stay float32.
  c.optim.frozen_dtype = "float32"
  # Factors on the learning rates of all parameters except tables,
  # PATTERN=FACTOR joined by ",", such as embed=0.1,memory=5; the first pattern
  # that is found in the parameter's path decides.
  c.optim.rate_multipliers = ""

  # Checkpoints: the newest `keep` of them, and the best by validation loss.
  c.checkpoint = ConfigDict()
  c.checkpoint.every = 1000  # steps; the last step is always saved
  c.checkpoint.keep = 2  # newest checkpoints that stay on disk

  # Steps that would harm a run are skipped: it keeps what it has, and goes on
  # with the next batch. Always skipped: a loss or gradient that is not finite.
  c.guard = ConfigDict()
  c.guard.max_skips = 10  # skipped in a row that end the run
  # Skip, too, if the gradient norm is more than this many times its mean over
  # about 50 steps; 0 = never.
  c.guard.spike = 0.0
  # How many times a run may return to its last checkpoint and continue after
  # the skipped data, before it ends.
  c.guard.rollbacks = 0

  # The sample that is printed when training ends.
  c.sample = ConfigDict()
  c.sample.prompt = "class Reader:\n    def __init__(self, "  # its beginning
  c.sample.num_tokens = 256  # new tokens, at most a million; 0 = none
  c.sample.temperature = 0.9  # divides the logits; 0 = the likeliest token
  c.sample.top_k = 0  # draw from the k likeliest tokens; 0 = from all
  # Draw from the fewest likeliest tokens whose probabilities sum to at least
  # this, in (0, 1].
  c.sample.top_p = 0.9

  # Devices along each axis of the mesh.
  c.mesh = ConfigDict()
  c.mesh.data = -1  # splits the batch; -1 = all devices that remain
  # Splits the batch and all weights, which are gathered for their use.
  c.mesh.fsdp = 1
  c.mesh.tensor = 1  # splits attention heads, MLP width and vocabulary
  c.mesh.table = 1  # splits only value tables and experts
  # The axes that split value tables, joined by ","; with `data` among them no
  # device holds a copy of another's rows.
  c.mesh.table_axes = "fsdp,tensor,table"
  return c.lock()
