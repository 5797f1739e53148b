"""Every knob, with its meaning, unit and range.

A variant imports this file, calls `get_config()` and overrides a few fields;
any field can be overridden on the command line too:

  python train.py --config=configs/tiny.py --config.steps=200
"""

from ml_collections import ConfigDict


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

  # Memory layer (UltraMem); the paper's symbol in brackets.
  c.model.memory = ConfigDict()
  c.model.memory.kind = "none"  # none (dense model) | ultramem | ultramem_v2
  # (one table for all memories, a ring) | memory_plus (one table for all) |
  # peer (rows are neurons). Some kinds demand values of fields below:
  # KIND_SETTINGS in ultramem_jax/memory_config.py
  c.model.memory.spans = ""  # "i:j/i:j": read in block i, added after block j
  # | full (i:i in every block i)
  c.model.memory.num_keys = 128  # [n] the table has n^2 rows
  c.model.memory.key_dim = 32  # [D_k / r] width of a key per side and rank
  c.model.memory.value_dim = 128  # [D_v] width of a row; divisible by num_cores
  c.model.memory.top_m = 16  # [m] rows read per head; at most sqrt(E) * n
  c.model.memory.num_heads = 2  # [H] independent key sets over one table
  c.model.memory.heads_per_query = 2  # heads that share one query: 1 to H
  c.model.memory.query_per_rank = True  # each Tucker rank has its own query
  c.model.memory.score = "tucker"  # tucker (TDQKR) | sum (product keys)
  c.model.memory.tucker_rank = 2  # [r]
  c.model.memory.num_cores = 2  # [h] multi-core scoring
  c.model.memory.softmax = False  # normalize each head's m scores, as PKM does
  c.model.memory.expansion = 4  # [E] implicit value expansion; a square
  c.model.memory.shuffle = "hash"  # virtual to physical rows: hash (computed)
  # | permutation (stored buffer) | none (identity)
  c.model.memory.value_projection = True  # linear D_v to D; needed if E > 1
  c.model.memory.query_key_norm = "layernorm"  # layernorm | rms | none
  c.model.memory.norm_bias = False  # learn a bias in those norms
  c.model.memory.norm_eps = 1e-5
  c.model.memory.query_conv = 5  # taps of the causal convolution; 0 = none
  c.model.memory.init = "paper"  # paper (calibrated) | official (their code)
  c.model.memory.aux_loss_weight = 0.001  # [alpha] of Tucker's auxiliary loss
  c.model.memory.aux_loss_margin = 0.15  # [tau] singular values up to this
  # cost nothing
  c.model.memory.num_projections = 0  # of pooled values: 1 | E | 0 (the kind's
  # own: 1 with ultramem_v2, else E, one for each block of the table)
  c.model.memory.query_bias = False  # learn a bias in the query projection
  c.model.memory.projection_bias = False  # in value projection and input gate
  c.model.memory.partition = "auto"  # of tables over mesh.table_axes: rows
  # (number-wise) | columns (dimension-wise) | auto (what moves fewer bytes) |
  # rows_pooled, rows_unpooled (rows, summed before or after they travel)
  c.model.memory.row_multiple = 1  # rows that a table, and the counters of its
  # use, are stored with are rounded up to a multiple of this, so that devices
  # can share them evenly; the rows beyond n^2 are never read
  c.model.memory.table_dtype = "float32"  # values in storage: float32 |
  # bfloat16 (rounded at random when updated; sparse updates only) | int8 (not
  # to be trained: python -m ultramem_jax quantize makes it from a run)
  c.model.memory.kernel = "xla"  # what reads tables: xla | pallas (reads each
  # row once; on a GPU not int8, on a TPU float32 alone, and not with partition
  # = rows_unpooled; whether it is faster has not been measured)
  # ultramem_v2 only:
  c.model.memory.share_ratio = 1.0  # share of the ring a memory reaches, (0, 1]
  c.model.memory.ring_layers = 0  # memories on the ring, n^2 rows each; 0 = all
  c.model.memory.pre_value_dim = 0  # width of pre-values; 0 = none
  c.model.memory.pre_activation = "none"  # of <pre-value, W_pre x>: none | gelu
  c.model.memory.spare_queries = 0  # queries no head reads (imported weights)
  # memory_plus only:
  c.model.memory.input_gate = True  # pooled values times silu(W_g x)
  c.model.memory.output_gate = False  # output times sigmoid(<w, x>)

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
  c.optim.table_catch_up = False  # a row that sparse updates left out makes up
  # for it when it is next read, so that they do what dense ones do; float32
  # tables and moments, one device, beta1^2 < beta2
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
