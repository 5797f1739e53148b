"""Every knob, with its meaning, unit and range.

A variant imports this file, calls `get_config()` and overrides a few fields;
any field can be overridden on the command line too:

  python train.py --config=configs/tiny.py --config.steps=200
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0  # of parameters, data order and dropout; less than 2^32
  c.steps = 1000  # optimizer steps of the whole run
  c.batch_size = 8  # sequences per step, over all devices and processes
  c.accumulation_steps = 1  # parts a batch is cut into to save memory
  c.log_every = 10  # steps between records in the logs
  c.eval_every = 1000  # steps between validations; the last step always is one
  c.eval_batches = 0  # batches per validation; 0 = the whole validation set

  # Data: text -> tokens -> rows of seq_len tokens.
  c.data = ConfigDict()
  c.data.source = "stdlib"  # stdlib (embedded) | text (files) | tfds
  c.data.path = ""  # text: glob of .txt, .py, .md ..., .jsonl, also .gz, .zst
  c.data.valid_path = ""  # text: glob for validation; "" = split path by hash
  c.data.valid_fraction = 0.04  # share of documents held out when split by hash
  c.data.tfds_name = ""  # tfds: name[/config][:version], such as c4/en:3.0.1
  c.data.tfds_dir = ""  # tfds: data directory; "" = ~/tensorflow_datasets
  c.data.train_split = "train"  # tfds: split to train on, slices allowed
  c.data.valid_split = "validation"  # tfds: split to evaluate on
  c.data.text_field = "text"  # jsonl and tfds: the field that holds the text
  c.data.tokenizer = "bytes"  # bytes | path of a Hugging Face tokenizer.json
  c.data.seq_len = 1024  # T, tokens a row
  c.data.packing = "segments"  # segments: attention and positions stay inside
  # a document | concat: documents run on, as in the paper's training
  c.data.cut_bytes = 0  # cut longer text files into documents of at most this
  # size for training, so that a long one does not fill a row of the batch for
  # many steps; 0 = leave them whole
  c.data.shuffle_window = 10000  # documents shuffled together where the source
  # is a stream (TFRecord); other sources shuffle globally
  c.data.prefetch = 2  # batches prepared ahead by a thread; 0 = none

  # Model: a pre-norm causal transformer with rotary positions.
  c.model = ConfigDict()
  c.model.vocab_size = 264  # V, at least the tokenizer's (bytes: 259)
  c.model.embed_dim = 256  # D
  c.model.num_layers = 4  # L
  c.model.num_heads = 4  # Q, attention heads; D / Q must be even
  c.model.mlp_dim = 1024  # F
  c.model.activation = "gelu"  # gelu | swiglu
  c.model.mlp_conv = 0  # taps of a causal depthwise convolution of what the MLP
  # (or mixture of experts, or memory) of a block reads; 0 = none
  c.model.mlp_conv_blocks = "full"  # blocks that have it, from 1: "i/j" | full
  c.model.norm = "layernorm"  # layernorm | rms
  c.model.norm_eps = 1e-5
  c.model.norm_bias = False  # learn a bias in norms
  c.model.qk_norm = False  # the norm on attention's queries and keys, per head
  c.model.tie_embeddings = False  # the output head shares the embedding
  c.model.rope_theta = 10000.0  # base of the rotary wavelengths
  c.model.dropout_rate = 0.0  # of embedding, attention, MLP and memory; [0, 1]
  c.model.dtype = "float32"  # of matmuls: float32 | bfloat16; parameters,
  # scores, norms, softmaxes and losses are float32 always
  c.model.attention = "xla"  # xla | cudnn (flash attention; GPU, bfloat16)
  c.model.remat = "none"  # none | block (recompute blocks in the backward)

  # Mixture of experts in place of the MLP of every block.
  c.model.moe = ConfigDict()
  c.model.moe.num_experts = 0  # X; 0 = MLPs
  c.model.moe.top_k = 2  # experts that a token goes to; none is ever dropped
  c.model.moe.expert_dim = 256  # width of an expert; its activation is above
  c.model.moe.balance_loss_weight = 0.01  # of the load-balance loss, per block

  # Memory layer (UltraMem); the paper's symbol in brackets. Where the default
  # is None, each kind has its own (ultramem_jax/settings/kinds.py); the one of
  # kind "ultramem" stands in parentheses.
  c.model.memory = ConfigDict()
  c.model.memory.kind = "none"  # none (dense model) | ultramem | ultramem_v2
  # (the memories share a ring of tables) | memory_plus (product keys and a
  # gate; the memories share one table) | peer (a row is a neuron)
  c.model.memory.spans = ""  # "i:j/i:j": read in block i, added after block j
  # | full (i:i in every block i)
  c.model.memory.num_keys = 128  # [n] the table has n^2 rows
  c.model.memory.key_dim = 32  # [D_k / r] width of a key per side and rank
  c.model.memory.value_dim = 128  # [D_v] width of a row; divisible by num_cores
  c.model.memory.top_m = 16  # [m] rows read per head; at most sqrt(E) * n
  c.model.memory.num_heads = 2  # [H] independent key sets over one table
  c.model.memory.heads_per_query = placeholder(int)  # heads that share one
  # query: 1 to H; None: the kind's own (2)
  c.model.memory.query_per_rank = True  # each Tucker rank has its own query
  c.model.memory.score = placeholder(str)  # tucker (TDQKR) | sum (product
  # keys); None: the kind's own (tucker)
  c.model.memory.tucker_rank = 2  # [r] vectors of a key, with score = tucker
  c.model.memory.num_cores = placeholder(int)  # [h] cores of multi-core
  # scoring; None: the kind's own (2)
  c.model.memory.softmax = placeholder(bool)  # normalize each head's m scores,
  # as PKM does; None: the kind's own (False)
  c.model.memory.expansion = placeholder(int)  # [E] implicit value expansion; a
  # square; None: the kind's own (4)
  c.model.memory.shuffle = placeholder(str)  # virtual to physical rows: hash
  # (computed) | permutation (stored buffer) | none (identity); None: the kind's
  # own (hash)
  c.model.memory.value_projection = placeholder(bool)  # a linear map from D_v
  # to D; needed if E > 1; None: the kind's own (True)
  c.model.memory.shared_projection = placeholder(bool)  # one projection for all
  # values instead of E of them; None: the kind's own (False)
  c.model.memory.query_key_norm = "layernorm"  # layernorm | rms | none
  c.model.memory.norm_eps = 1e-5  # added to the variance in those norms
  c.model.memory.query_conv = placeholder(int)  # taps of the causal convolution
  # before the query; 0 = no convolution; None: the kind's own (5)
  c.model.memory.init = placeholder(str)  # paper (calibrated) | official (as in
  # the authors' code); None: the kind's own (paper)
  c.model.memory.aux_loss_weight = 0.001  # [alpha] of Tucker's auxiliary loss
  c.model.memory.aux_loss_margin = 0.15  # [tau] singular values up to this
  # cost nothing
  # Only ultramem_v2 reads these:
  c.model.memory.share_ratio = 1.0  # share of the ring a memory reaches, (0, 1]
  c.model.memory.ring_layers = 0  # memories on the ring, n^2 rows each; 0 = all
  c.model.memory.pre_value_dim = 0  # width of pre-values; 0 = no pre-values
  c.model.memory.pre_activation = "none"  # of <pre-value, W_pre x>: none | gelu
  # Only memory_plus reads this:
  c.model.memory.input_gate = placeholder(bool)  # multiply the pooled values by
  # silu(W_g x); None: the kind's own (False; True with memory_plus)

  # Where the tables of the memories lie, and in which form.
  c.model.memory.storage = ConfigDict()
  c.model.memory.storage.partition = "auto"  # of tables over mesh.table_axes:
  # rows (number-wise) | columns (dimension-wise) | auto (what moves fewer
  # bytes) | rows_pooled, rows_unpooled (rows, summed before or after they
  # travel)
  c.model.memory.storage.row_multiple = 1  # the rows of a table, and the
  # counters of their use, are stored in multiples of this, so that devices can
  # share them evenly; the rows beyond n^2 are never read
  c.model.memory.storage.table_dtype = "float32"  # float32 | bfloat16 (rounded
  # at random when updated; sparse updates only) | int8 (cannot be trained; the
  # command `quantize` makes it from a run)
  c.model.memory.storage.kernel = "xla"  # what reads tables: xla | pallas
  # (reads each row once; not int8 on a GPU, only float32 on a TPU, and not with
  # partition = rows_unpooled; its speed has not been measured)

  # What only imported weights have (ultramem_jax/interop sets these).
  c.model.memory.imported = ConfigDict()
  c.model.memory.imported.spare_queries = 0  # queries that no head reads
  c.model.memory.imported.norm_bias = False  # a bias in query and key norm
  c.model.memory.imported.query_bias = False  # a bias in the query projection
  c.model.memory.imported.projection_bias = False  # a bias in the value
  # projection and the input gate
  c.model.memory.imported.output_gate = False  # multiply the output by
  # sigmoid(<w, x>); memory_plus only

  # AdamW.
  c.optim = ConfigDict()
  c.optim.learning_rate = 1e-3  # peak
  c.optim.warmup_fraction = 0.01  # share of steps with rising rate, below 1
  c.optim.init_fraction = 0.0  # rate at the first step, share of the peak
  c.optim.final_fraction = 0.1  # rate at the last step (cosine), of the peak
  c.optim.beta1 = 0.9
  c.optim.beta2 = 0.95
  c.optim.eps = 1e-8
  c.optim.weight_decay = 0.1  # of weights, keys and value tables
  c.optim.decay_norms = False  # decay norm weights and biases as well
  c.optim.clip_norm = 1.0  # of the global gradient; 0 = no clipping
  c.optim.value_lr_multiplier = 10.0  # [k] factor on the rate of value tables
  # at step 0 ...
  c.optim.value_lr_horizon = 1.0  # ... falling linearly to 1 at this share of
  # the steps, (0, 1]
  c.optim.table_update = "auto"  # of value tables: dense (all rows) | sparse
  # (the rows that were read; others neither decay nor move by their momentum)
  # | auto (sparse where a step reads few of the rows)
  c.optim.table_moments = "float32"  # of value tables: float32 | bfloat16
  # (rounded at random; sparse updates only)
  c.optim.table_second_moment = "element"  # of value tables: element | row (one
  # float32 for each row, the mean over it; sparse updates only)
  c.optim.z_loss = 0.0  # weight of log(sum exp logits)^2

  # Checkpoints: the newest `keep` and the best by validation loss.
  c.checkpoint = ConfigDict()
  c.checkpoint.every = 1000  # steps; the last step always is saved
  c.checkpoint.keep = 2

  # The sample printed when training ends.
  c.sample = ConfigDict()
  c.sample.prompt = "class Reader:\n    def __init__(self, "
  c.sample.num_tokens = 256
  c.sample.temperature = 0.9  # 0 = greedy
  c.sample.top_k = 0  # keep the k likeliest tokens; 0 = all
  c.sample.top_p = 0.9  # keep the likeliest tokens of this total probability

  # Devices along each axis of the mesh; README, "On many devices".
  c.mesh = ConfigDict()
  c.mesh.data = -1  # split the batch; -1 = all devices that remain
  c.mesh.fsdp = 1  # split the batch and all weights, gathered for their use
  c.mesh.tensor = 1  # split attention heads, MLP width and vocabulary
  c.mesh.table = 1  # split value tables and experts alone
  c.mesh.table_axes = "fsdp,tensor,table"  # axes that value tables are split
  # over, joined by ","; with data too no device holds a copy of another's
  return c.lock()
