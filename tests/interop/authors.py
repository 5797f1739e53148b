"""The authors' layers and their model, written out plainly.

In their layouts: x_TD [T, D] is all tokens. w holds their tensors by name, s
their settings.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

TABLE = "full_memory_layer."


def plain(function):
  """Runs a reference in float64, without the tests' rule on broadcasting."""

  @functools.wraps(function)
  def run(*arguments):
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
      return function(*arguments)

  return run


def norm(s, w, name, x):
  """Over the last axis, whatever it is."""
  if s.get("layer_norm_type", "rms") != "rms":
    x = x - x.mean(-1, keepdims=True)
  x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + s["layer_norm_eps"])
  return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)


def top(score, m):
  return jax.lax.top_k(jax.lax.stop_gradient(score), m)[1]


def take(x, index):
  return jnp.take_along_axis(x, index, axis=1)


def tucker_retrieval(s, w, x_TD, pairs):
  """Cells [T, A m] and scores [T, A m, C]."""
  tokens, m, width = len(x_TD), s["knn"], s["kdim"]
  query = (x_TD @ w["query_proj.weight"].T).reshape(tokens, pairs, 2, width)
  query = norm(s, w, "query_norm", query)
  keys = norm(s, w, "keys_norm", w["keys"].swapaxes(-1, -2)).swapaxes(-1, -2)
  num_keys = keys.shape[2]
  cores = [w[f"tucker_core.{i}"] for i in range(s["tucker_multihead"])]
  cells, scores = [], []
  for a in range(s["head"]):
    kept, side = [], []
    for p, name in enumerate("uv"):
      score = jnp.einsum("tk,nkr->tnr", query[:, a // 2, p], keys[a, p])
      index = top(score @ w[f"tucker_core_{name}"][0, a, 0], m)
      kept.append(index)
      side.append(take(score, index[:, :, None]))
    grids = jnp.stack(
      [
        jnp.einsum("tmr,rq,tnq->tmn", side[0], core[a], side[1])
        for core in cores
      ],
      -1,
    ).reshape(tokens, m * m, -1)
    best = top(grids.sum(-1), m)
    cells.append(take(kept[0], best // m) * num_keys + take(kept[1], best % m))
    scores.append(take(grids, best[:, :, None]))
  return jnp.concatenate(cells, 1), jnp.concatenate(scores, 1)


def pooled_blocks(table, row, block, score, num_pools):
  """[T, E, W]; the i-th slice of a row weighted by core i's score."""
  value = table[row] * jnp.repeat(
    score, table.shape[1] // score.shape[-1], axis=-1
  )
  inside = block[..., None] == jnp.arange(num_pools)
  return jnp.einsum("tke,tkw->tew", inside.astype(value.dtype), value)


def v1_layer(s, w, x_TD):
  cell, score = tucker_retrieval(s, w, x_TD, 1)
  slot = w["shuffle_index"][cell]
  size = s["knum"] ** 2
  pooled = pooled_blocks(
    w["values_for_look_up"],
    slot % size,
    slot // size,
    score,
    s["value_expand_time"],
  )
  y_TD = pooled.reshape(len(x_TD), -1) @ w["values_proj.weight"].T
  return y_TD, cell, score


def v2_layer(s, w, x_TD):
  per_rank = s["mem_q_for_each_tucker_rank"]
  pairs = s["tucker_rank"] if per_rank else 1
  cell, score = tucker_retrieval(s, w, x_TD, pairs)
  slot = w["shuffle_index"][cell]
  ring = s["knum"] ** 2 * s["mem_layer_num"]
  size = int((ring * s["share_ratio"]) ** 0.5) ** 2
  row = (slot % size + s.get("layer_id", 0) * s["knum"] ** 2) % ring
  weight = score
  if s["pre_vdim"]:
    pre = jnp.einsum(
      "tu,tku->tk",
      x_TD @ w["pre_values_proj.weight"].T,
      w[f"{TABLE}pre_values_for_look_up"][row],
    )
    if s["mem_use_glu_act"]:
      pre = 0.5 * pre * (1 + jax.scipy.special.erf(pre / 2**0.5))
    weight = score * pre[..., None]
  pooled = pooled_blocks(
    w[f"{TABLE}values_for_look_up"],
    row,
    slot // size,
    weight,
    s["mem_key_expand_time"] ** 2,
  )
  if s["value_expand_time"] == 1:
    pooled = pooled.sum(1)
  y_TD = pooled.reshape(len(x_TD), -1) @ w["values_proj.weight"].T
  return y_TD, cell, score


def product_retrieval(query, keys, m):
  """Cells [T, A m] and softmax of their scores; query [T, A, 2, K]."""
  cells, scores = [], []
  num_keys = keys.shape[2]
  for a in range(keys.shape[0]):
    side = [query[:, a, p] @ keys[a, p].T for p in (0, 1)]
    grid = (side[0][:, :, None] + side[1][:, None]).reshape(len(query), -1)
    best = top(grid, m)
    assert grid.shape[1] == num_keys**2
    cells.append(best)
    scores.append(jax.nn.softmax(take(grid, best), axis=-1))
  return jnp.concatenate(cells, 1), jnp.concatenate(scores, 1)[..., None]


def memory_plus_layer(s, w, x_TD):
  query = (x_TD @ w["query_proj.weight"].T).reshape(
    len(x_TD), s["head"], 2, s["kdim"]
  )
  cell, score = product_retrieval(
    norm(s, w, "query_norm", query), w["keys"], s["knn"]
  )
  pooled = (w[f"{TABLE}values_for_look_up"][cell] * score).sum(1)
  gate = x_TD @ w["swilu_projection.weight"].T
  y_TD = (pooled * jax.nn.silu(gate)) @ w["values_proj.weight"].T
  return y_TD, cell, score


def meta_layer(s, w, x_TD):
  linear = lambda name, x: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
  heads, half = s["mem_heads"], s["mem_k_dim"] // 2
  query = linear("query_proj.query_mlps.0", x_TD)
  cell, score = product_retrieval(
    query.reshape(len(x_TD), heads, 2, half),
    w["keys"].reshape(heads, 2, -1, half),
    s["mem_knn"],
  )
  y = (w["values.weight"][cell] * score).sum(1)
  if s["swilu_projection"]:
    y = y * jax.nn.silu(linear("swilu_projection", x_TD))
  if "value_proj.weight" in w:
    y = linear("value_proj", y)
  if s["mem_gated"]:
    y = y * jax.nn.sigmoid(linear("gating", x_TD))
  return y, cell, score


LAYERS = {
  "ultramem_v1": v1_layer,
  "ultramem_v2": v2_layer,
  "memory_plus": memory_plus_layer,
  "meta_memory": meta_layer,
}


def float_and_other(arrays):
  """As jax arrays, those of floats in float64."""
  floats = {
    k: np.float64(v)
    for k, v in arrays.items()
    if np.issubdtype(v.dtype, np.floating)
  }
  others = {k: v for k, v in arrays.items() if k not in floats}
  return jax.device_put((floats, others))


def attention(s, w, x):
  """Causal, with rotary positions, of one sequence [T, D]."""
  width, heads = s["d_model"], s["n_heads"]
  head_width = width // heads
  angle = np.arange(len(x))[:, None] * s["rope_theta"] ** (
    -np.arange(0, head_width, 2) / head_width
  )
  cos, sin = (np.tile(f(angle), 2) for f in (np.cos, np.sin))

  def rotate(x):
    left, right = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-right, left], -1) * sin

  length = len(x)
  query, key, value = (
    (x @ w["att_proj.weight"].T)
    .reshape(length, 3, heads, head_width)
    .transpose(1, 2, 0, 3)
  )
  query = rotate(norm(s, w, "q_norm", query))
  key = rotate(norm(s, w, "k_norm", key))
  score = query @ key.swapaxes(1, 2) / head_width**0.5
  score = jnp.where(np.tri(length, dtype=bool), score, -jnp.inf)
  y = jax.nn.softmax(score, -1) @ value
  return y.swapaxes(0, 1).reshape(length, width) @ w["attn_out.weight"].T


def mlp(w, x):
  up, gate = jnp.split(x @ w["ff_proj.weight"].T, 2, -1)
  return (jax.nn.silu(gate) * up) @ w["ff_out.weight"].T


def official_model(s, w, tokens_BT):
  """The authors' model, plainly: logits."""
  tensors = lambda prefix: {
    k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)
  }
  way = s["mem_insert_way"]
  layers = range(s["n_layers"])
  spans = [f"{i}:{i}" for i in layers] if way == "full" else way.split("/")
  spans = [tuple(map(int, span.split(":"))) for span in spans]
  first = tensors("transformer.mem_blocks.0.")
  layer_settings = {
    **s,
    "head": s["mem_head"],
    "pre_vdim": s["mem_pre_vdim"],
    "share_ratio": s["mem_share_ratio"],
    "mem_layer_num": len(spans),
    **{k: s[f"mem_{k}"] for k in ("knum", "kdim", "vdim", "knn")},
    "tucker_rank": 2,
    "tucker_multihead": 2,
    "value_expand_time": first["values_proj.weight"].shape[1] // s["mem_vdim"],
  }
  logits = []
  for tokens_T in tokens_BT:
    x, read = w["transformer.wte.weight"][tokens_T], {}
    for i in layers:
      block = tensors(f"transformer.blocks.{i}.")
      x = x + attention(s, block, norm(s, block, "attn_norm", x))
      h = norm(s, block, "ff_norm", x)
      x = x + mlp(block, h)
      for index, (start, end) in enumerate(spans):
        if i == start:
          memory = {
            **tensors(f"transformer.mem_blocks.{index}."),
            **{
              k: v
              for k, v in tensors("transformer.").items()
              if k.startswith(TABLE)
            },
          }
          read[index] = LAYERS[s["mem_type"]](
            {**layer_settings, "layer_id": index}, memory, h
          )[0]
        if i == end:
          x = x + read[index]
    head = w.get("transformer.ff_out.weight", w["transformer.wte.weight"])
    logits.append(norm(s, w, "transformer.ln_f", x) @ head.T)
  return jnp.stack(logits)
