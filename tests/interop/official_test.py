"""The authors' weights: against goldens, and their layers written out here."""

import dataclasses
import functools
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax import interop, testing
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
CLASSES = {
  "UltraMemLayerV1": "ultramem_v1",
  "UltraMemLayerV2": "ultramem_v2",
  "MemoryLayerPlus": "memory_plus",
}
TABLE = "full_memory_layer."
GRADIENT_TOLERANCE = 1e-4


@functools.cache
def golden(name):
  """(settings, state_dict, gradients, arrays) of a golden."""
  info = json.loads((GOLDENS / f"{name}.json").read_text())
  arrays = dict(np.load(GOLDENS / f"{name}.npz"))
  settings = {**info.get("kwargs", {}), **info["config"]}

  def named(*kinds):
    return {
      key.replace(f"{kind}/", "", 1).replace("/", "."): array
      for key, array in arrays.items()
      for kind in kinds
      if key.replace(TABLE[:-1] + "/", "").startswith(f"{kind}/")
    }

  kind = CLASSES.get(info.get("cls"))
  return kind, settings, named("param", "buffer"), named("grad"), arrays


# The authors' layers, plainly, in their layouts: x_TD [T, D] is all tokens.
# Runs in float64. w holds their tensors, s their settings.


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


@plain
def reference(kind, s, state_dict, x_BTD, cotangent_BTD):
  """Output, cells, scores; gradients of the tensors and of the input."""

  def loss(tensors, x_TD):
    y_TD, *found = LAYERS[kind](s, {**buffers, **tensors}, x_TD)
    y_BTD = y_TD.reshape(x_BTD.shape)
    return (y_BTD * cotangent_BTD).sum(), (y_BTD, *found)

  tensors, buffers = float_and_other(state_dict)
  x_TD = np.float64(x_BTD).reshape(-1, x_BTD.shape[-1])
  (_, (y, cell, score)), (grads, grad_x) = jax.jit(
    jax.value_and_grad(loss, (0, 1), has_aux=True)
  )(tensors, x_TD)
  return jax.device_get((y, cell, score, grads, grad_x.reshape(x_BTD.shape)))


def imported(kind, s, state_dict, x_BTD, cotangent_BTD):
  """The same of the imported layer; gradients under their names."""
  layer, variables = interop.from_official(kind, state_dict, **s)

  def loss(params, x_BTD):
    y_BTD, sown = layer.apply(
      {**variables, "params": params}, x_BTD, mutable=["intermediates"]
    )
    return (y_BTD * cotangent_BTD).sum(), (y_BTD, sown["intermediates"])

  (_, (y_BTD, sown)), (grads, grad_x) = jax.jit(
    jax.value_and_grad(loss, (0, 1), has_aux=True)
  )(variables["params"], x_BTD)
  tokens = x_BTD.shape[0] * x_BTD.shape[1]
  cell = np.asarray(sown["index_BTAM"][0]).reshape(tokens, -1)
  score = np.asarray(sown["score_BTAMC"][0]).reshape(*cell.shape, -1)
  named = interop.to_official(kind, {"params": grads}, **s)
  return (y_BTD, cell, score, named, grad_x), (layer, variables)


def assert_same(actual, expected):
  """(output, cells, scores, gradients, gradient of the input)."""
  y, cell, score, grads, grad_x = actual
  y_, cell_, score_, grads_, grad_x_ = expected
  np.testing.assert_array_equal(cell, cell_)
  assert_close(y, y_)
  assert_close(score, score_)
  assert_close(grad_x, grad_x_, tolerance=GRADIENT_TOLERANCE)
  for name, grad in grads.items():
    if name in grads_ and grads_[name].any():
      assert_close(grad, grads_[name], tolerance=GRADIENT_TOLERANCE)
    else:
      assert not grad.any(), name  # such as Memory+'s unused key norm


def assert_same_tensors(actual, expected):
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(
      actual[name], array.astype(actual[name].dtype), err_msg=name
    )


def assert_new_weights_round_trip(kind, s, layer):
  """Export then import of variables such as the layer makes itself."""
  x_BTD = np.zeros((1, 2, layer.embed_dim), np.float32)
  fresh = testing.random_variables(layer, x_BTD)
  named = interop.to_official(kind, fresh, **s)
  _, again = interop.from_official(kind, named, **s)
  jax.tree.map(np.testing.assert_array_equal, again, fresh)


@pytest.mark.parametrize("name", ["v1_a", "v1_b", "v2_a", "memplus_a"])
def test_golden_layer(name):
  kind, s, state_dict, grads, arrays = golden(name)
  expected = (
    arrays["output"],
    arrays["best_indice"],
    arrays["best_scores"].reshape(*arrays["best_indice"].shape, -1),
    grads,
    arrays["grad_input"],
  )
  inputs = (arrays["input"], arrays["cotangent"])
  actual, (layer, variables) = imported(kind, s, state_dict, *inputs)
  assert_same(actual, expected)
  assert_same_tensors(interop.to_official(kind, variables, **s), state_dict)
  assert_new_weights_round_trip(kind, s, layer)
  # The layer as this file writes it is the authors' to the last digit, except
  # that their Memory+ takes the softmax in float32.
  tolerance = 1e-6 if kind == "memory_plus" else 1e-12
  y, cell, score, grads_, grad_x = reference(kind, s, state_dict, *inputs)
  np.testing.assert_array_equal(cell, expected[1])
  assert_close(
    (y, score, grad_x), (*expected[::2][:2], expected[4]), tolerance=tolerance
  )
  for name, grad in grads.items():
    assert_close(grads_[name], grad, tolerance=tolerance)


SMALL = dict(
  hidden_size=24,
  knum=5,
  kdim=6,
  vdim=12,
  knn=3,
  head=1,
  tucker_rank=2,
  tucker_multihead=2,
  layer_norm_type="rms",
  layer_norm_eps=1e-5,
)
SMALL_V2 = dict(
  SMALL,
  value_expand_time=1,
  share_ratio=1.0,
  mem_layer_num=1,
  pre_vdim=0,
  mem_q_for_each_tucker_rank=True,
  mem_key_expand_time=1,
  mem_use_glu_act=False,
)
SMALL_PLUS = {k: v for k, v in SMALL.items() if "tucker" not in k}
SMALL_META = dict(
  input_dim=20,
  output_dim=20,
  mem_k_dim=12,
  mem_v_dim=-1,
  mem_heads=2,
  mem_knn=3,
  mem_n_keys=6,
  mem_query_bias=True,
  mem_gated=False,
  swilu_projection=True,
)
LAYER_NORM = dict(layer_norm_type="default", bias_for_layer_norm=True)
# Each covers several settings, in other combinations than the goldens.
CASES = {
  "v1 rank 1, no expansion, LayerNorm without bias, width of the model": (
    "ultramem_v1",
    {
      **SMALL,
      "tucker_rank": 1,
      "value_expand_time": 1,
      "layer_norm_type": "default",
      "vdim": 24,
      "bias_for_layer_norm": None,
      "include_bias": False,
      "layer_norm_eps": 1e-3,
    },
  ),
  "v1 rank 3, E 9, one core, RMSNorm with bias": (
    "ultramem_v1",
    {
      **SMALL,
      "tucker_rank": 3,
      "value_expand_time": 9,
      "tucker_multihead": 1,
      "head": 2,
      "include_bias": True,
    },
  ),
  "v1 rank 4, E 16, four cores, LayerNorm": (
    "ultramem_v1",
    {
      **SMALL,
      **LAYER_NORM,
      "tucker_rank": 4,
      "head": 2,
      "value_expand_time": 16,
      "tucker_multihead": 4,
    },
  ),
  "v2 one query pair, ring": (
    "ultramem_v2",
    {
      **SMALL_V2,
      "mem_q_for_each_tucker_rank": False,
      "head": 2,
      "mem_layer_num": 4,
      "share_ratio": 0.55,
      "layer_id": 3,
    },
  ),
  "v2 four heads, outside its ring": (
    "ultramem_v2",
    {**SMALL_V2, "head": 4, "mem_layer_num": 2, "layer_id": 5},
  ),
  "v2 three heads, rank 3, LayerNorm": (
    "ultramem_v2",
    {**SMALL_V2, **LAYER_NORM, "head": 3, "tucker_rank": 3},
  ),
  "v2 ring, keys expanded": (
    "ultramem_v2",
    {
      **SMALL_V2,
      "mem_layer_num": 3,
      "share_ratio": 0.3,
      "layer_id": 2,
      "mem_key_expand_time": 2,
      "head": 2,
    },
  ),
  "v2 keys and values expanded, pre-values": (
    "ultramem_v2",
    {
      **SMALL_V2,
      "mem_layer_num": 2,
      "layer_id": 1,
      "share_ratio": 0.7,
      "mem_key_expand_time": 3,
      "value_expand_time": 9,
      "pre_vdim": 7,
    },
  ),
  "v2 gated": (
    "ultramem_v2",
    {
      **SMALL_V2,
      "pre_vdim": 6,
      "mem_use_glu_act": True,
      "mem_layer_num": 2,
      "share_ratio": 0.5,
      "layer_id": 1,
      "tucker_multihead": 3,
      "tucker_rank": 1,
      "mem_key_expand_time": 2,
    },
  ),
  "memory plus, three heads, LayerNorm": (
    "memory_plus",
    {**SMALL_PLUS, **LAYER_NORM, "head": 3},
  ),
  "meta": ("meta_memory", SMALL_META),
  "meta, gated": (
    "meta_memory",
    {**SMALL_META, "mem_gated": True, "mem_v_dim": 14, "mem_query_bias": False},
  ),
  "meta, no swilu": (
    "meta_memory",
    {**SMALL_META, "swilu_projection": False, "mem_v_dim": 8},
  ),
  "meta, no projection": (
    "meta_memory",
    {**SMALL_META, "swilu_projection": False},
  ),
}


def shapes(kind, s):
  """Of every tensor of a layer, in the authors' layouts."""
  if kind == "meta_memory":
    width, heads, keys = s["input_dim"], s["mem_heads"], s["mem_n_keys"]
    value = s["mem_v_dim"] if s["mem_v_dim"] > 0 else width
    query = heads * s["mem_k_dim"]
    found = {
      "keys": (2 * heads * keys, s["mem_k_dim"] // 2),
      "values.weight": (keys**2, value),
      "query_proj.query_mlps.0.weight": (query, width),
    }
    if s["mem_query_bias"]:
      found["query_proj.query_mlps.0.bias"] = (query,)
    linears = {
      "swilu_projection": (value, width),
      "gating": (1, width),
      "value_proj": (width, value),
    }
    absent = {
      "swilu_projection": not s["swilu_projection"],
      "gating": not s["mem_gated"],
      "value_proj": not s["swilu_projection"] and s["mem_v_dim"] < 0,
    }
    for name, shape in linears.items():
      if not absent[name]:
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found
  width, value, keys, key = s["hidden_size"], s["vdim"], s["knum"], s["kdim"]
  heads, rank = s["head"], s.get("tucker_rank")
  found = {"query_norm.weight": (key,), "keys_norm.weight": (key,)}
  if s.get("bias_for_layer_norm") or s.get("include_bias"):
    found |= {"query_norm.bias": (key,), "keys_norm.bias": (key,)}
  if kind == "memory_plus":
    return found | {
      "query_proj.weight": (heads * 2 * key, width),
      "keys": (heads, 2, keys, key),
      "values_proj.weight": (width, value),
      "swilu_projection.weight": (value, width),
      f"{TABLE}values_for_look_up": (keys**2, value),
    }
  table = "values_for_look_up"
  pairs, rows, side, expand = 1, keys**2, keys, s.get("value_expand_time")
  sides = math.isqrt(expand)
  if kind == "ultramem_v2":
    table = TABLE + table
    pairs = rank if s["mem_q_for_each_tucker_rank"] else 1
    rows *= s["mem_layer_num"]
    side = int((rows * s["share_ratio"]) ** 0.5)
    sides = s["mem_key_expand_time"]
    if s["pre_vdim"]:
      found["pre_values_proj.weight"] = (s["pre_vdim"], width)
      found[f"{TABLE}pre_values_for_look_up"] = (rows, s["pre_vdim"])
  return found | {
    "query_proj.weight": (pairs * 2 * key, width),
    "keys": (heads, 2, sides * side, key, rank),
    "values_proj.weight": (width, expand * value),
    table: (rows, value),
    "shuffle_index": ((sides * side) ** 2,),
    **{
      f"tucker_core.{i}": (heads, rank, rank)
      for i in range(s["tucker_multihead"])
    },
    "tucker_core_u": (1, heads, 1, rank),
    "tucker_core_v": (1, heads, 1, rank),
  }


def random_tensors(kind, s, seed=0):
  rng = np.random.default_rng(seed)
  tensors = {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes(kind, s).items()
  }
  for name in tensors:
    if name.endswith("proj.weight"):
      tensors[name] /= np.float32(tensors[name].shape[1] ** 0.5)
  if "shuffle_index" in tensors:
    tensors["shuffle_index"] = rng.permutation(tensors["shuffle_index"].size)
    cores = [v for k, v in tensors.items() if k.startswith("tucker_core.")]
    left, _, right = np.linalg.svd(sum(cores))
    tensors["tucker_core_u"] = left[None, :, None, :, 0]
    tensors["tucker_core_v"] = right[None, :, None, 0]
  return tensors


@pytest.mark.parametrize("case", CASES)
def test_layer_is_the_authors(case):
  kind, s = CASES[case]
  state_dict = random_tensors(kind, s)
  width = s.get("hidden_size", s.get("input_dim"))
  rng = np.random.default_rng(1)
  x, cotangent = rng.normal(size=(2, 2, 5, width)).astype(np.float32)
  actual, (layer, variables) = imported(kind, s, state_dict, x, cotangent)
  assert_same(actual, reference(kind, s, state_dict, x, cotangent))
  assert_same_tensors(interop.to_official(kind, variables, **s), state_dict)
  if case in ("v2 gated", "v2 three heads, rank 3, LayerNorm", "meta, gated"):
    assert_new_weights_round_trip(kind, s, layer)


def test_surplus_query_pairs_are_kept_with_zero_gradient():
  kind, s = "ultramem_v2", {**SMALL_V2, "head": 2, "tucker_rank": 3}
  state_dict = random_tensors(kind, s)
  x = np.random.default_rng(1).normal(size=(1, 6, 24)).astype(np.float32)
  (_, _, _, grads, _), _ = imported(kind, s, state_dict, x, np.ones_like(x))
  grad = grads["query_proj.weight"].reshape(3, -1)
  assert grad[0].any() and not grad[1:].any()


# Whole models.


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
  width, heads = s["d_model"], s["n_heads"]
  head_width = width // heads
  angle = np.arange(tokens_BT.shape[1])[:, None] * s["rope_theta"] ** (
    -np.arange(0, head_width, 2) / head_width
  )
  cos, sin = (np.tile(f(angle), 2) for f in (np.cos, np.sin))

  def rotate(x):
    left, right = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-right, left], -1) * sin

  def attention(w, x):
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

  logits = []
  for tokens_T in tokens_BT:
    x, read = w["transformer.wte.weight"][tokens_T], {}
    for i in layers:
      block = tensors(f"transformer.blocks.{i}.")
      x = x + attention(block, norm(s, block, "attn_norm", x))
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


def next_token_loss(logits_BTV, tokens_BT):
  log_p = jax.nn.log_softmax(logits_BTV[:, :-1])
  return -jnp.take_along_axis(log_p, tokens_BT[:, 1:, None], -1).mean()


def imported_model(s, state_dict, tokens_BT):
  """Loss, logits, gradients by name; cells of each memory."""
  model, variables = interop.from_official_model(s, state_dict)

  def loss(params):
    logits_BTV, sown = model.apply(
      {**variables, "params": params}, tokens_BT, mutable=["intermediates"]
    )
    found = {k: v["index_BTAM"][0] for k, v in sown["intermediates"].items()}
    return next_token_loss(logits_BTV, tokens_BT), (logits_BTV, found)

  (loss, (logits_BTV, cells)), grads = jax.jit(
    jax.value_and_grad(loss, has_aux=True)
  )(variables["params"])
  assert_same_tensors(interop.to_official_model(s, variables), state_dict)
  named = interop.to_official_model(s, {"params": grads})
  return loss, logits_BTV, named, cells


def test_golden_model():
  _, s, state_dict, _, arrays = golden("model_v1_skip")
  grads = np.load(GOLDENS / "model_v1_skip_grads.npz")
  tokens_BT = arrays["input_ids"]
  loss, logits, named, cells = imported_model(s, state_dict, tokens_BT)
  for index in (0, 1):
    expected = arrays[f"act/mem{index}/best_indice"]
    np.testing.assert_array_equal(
      np.reshape(cells[f"memory_{index}"], expected.shape), expected
    )
  assert_close(logits, arrays["logits"])
  assert_close(loss, arrays["loss"])
  assert {f"grad/{name}" for name in named} == set(grads.files)
  for name, grad in named.items():
    assert_close(grad, grads[f"grad/{name}"], tolerance=GRADIENT_TOLERANCE)
  written_out = plain(jax.jit(functools.partial(official_model, s)))
  assert_close(
    written_out(state_dict, tokens_BT), arrays["logits"], tolerance=1e-6
  )


MODEL = dict(
  d_model=16,
  n_layers=2,
  n_heads=2,
  mlp_hidden_size=24,
  weight_tying=False,
  rope=True,
  rope_theta=500,
  attention_layer_norm=True,
  vocab_size=30,
  layer_norm_eps=1e-5,
  activation_type="swiglu",
  block_type="sequential",
  mem_insert_way="full",
  mem_knum=5,
  mem_kdim=6,
  mem_vdim=8,
  mem_knn=3,
  mem_head=2,
  mem_pre_vdim=0,
  mem_share_ratio=1.0,
  mem_value_expand_time=1,
  mem_key_expand_time=1,
  mem_q_for_each_tucker_rank=False,
  mem_use_glu_act=False,
)
MODELS = {
  "v2 full": dict(
    mem_type="ultramem_v2",
    mem_share_ratio=0.4,
    mem_pre_vdim=4,
    mem_key_expand_time=2,
    mem_q_for_each_tucker_rank=True,
    mem_head=3,
  ),
  "memory plus, LayerNorm with bias, overlapping": dict(
    mem_type="memory_plus",
    mem_insert_way="0:1/1:2",
    n_layers=3,
    mem_vdim=16,
    layer_norm_type="default",
    bias_for_layer_norm=True,
    embedding_size=32,
  ),
}


def model_shapes(s):
  width, heads = s["d_model"], s["n_heads"]
  vocabulary = s.get("embedding_size", s["vocab_size"])
  norms = {"transformer.ln_f": width}
  found = {"transformer.wte.weight": (vocabulary, width)}
  if not s["weight_tying"]:
    found["transformer.ff_out.weight"] = (vocabulary, width)
  hidden = s["mlp_hidden_size"]
  for i in range(s["n_layers"]):
    block = f"transformer.blocks.{i}."
    found |= {
      f"{block}att_proj.weight": (3 * width, width),
      f"{block}attn_out.weight": (width, width),
      f"{block}ff_proj.weight": (hidden, width),
      f"{block}ff_out.weight": (width, hidden // 2),
    }
    norms |= {
      f"{block}attn_norm": width,
      f"{block}ff_norm": width,
      f"{block}q_norm": width // heads,
      f"{block}k_norm": width // heads,
    }
  for name, size in norms.items():
    found[f"{name}.weight"] = (size,)
    if s.get("bias_for_layer_norm"):
      found[f"{name}.bias"] = (size,)
  return found


@pytest.mark.parametrize("case", MODELS)
def test_model_is_the_authors(case):
  s = {**MODEL, **MODELS[case]}
  rng = np.random.default_rng(2)
  state_dict = {
    name: rng.normal(size=shape, scale=shape[-1] ** -0.5).astype(np.float32)
    for name, shape in model_shapes(s).items()
  }
  state_dict["transformer.wte.weight"] *= 3
  way = s["mem_insert_way"]
  layers = s["n_layers"] if way == "full" else way.count("/") + 1
  kind = s["mem_type"]
  layer = {
    **SMALL,
    **s,
    "hidden_size": s["d_model"],
    "head": s["mem_head"],
    "pre_vdim": s["mem_pre_vdim"],
    "share_ratio": s["mem_share_ratio"],
    "mem_layer_num": layers,
    "value_expand_time": 4 if kind == "ultramem_v1" else 1,
    **{k: s[f"mem_{k}"] for k in ("knum", "kdim", "vdim", "knn")},
  }
  for index in range(layers):
    for name, tensor in random_tensors(kind, layer, index).items():
      prefix = "" if name.startswith(TABLE) else f"mem_blocks.{index}."
      state_dict[f"transformer.{prefix}{name}"] = tensor
  tokens_BT = rng.integers(0, s["vocab_size"], (1, 9))

  @plain
  def expected():
    def loss(tensors):
      logits_BTV = official_model(s, {**buffers, **tensors}, tokens_BT)
      return next_token_loss(logits_BTV, tokens_BT), logits_BTV

    tensors, buffers = float_and_other(state_dict)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(tensors)

  (loss_, logits_), grads_ = expected()
  loss, logits, grads, _ = imported_model(s, state_dict, tokens_BT)
  assert_close(logits, logits_)
  assert_close(loss, loss_)
  for name, grad in grads.items():
    assert_close(grad, grads_[name], tolerance=GRADIENT_TOLERANCE)


def test_dense_model_has_no_memory():
  s = {**MODEL, "mem_insert_way": "no_mem", "mem_type": "ultramem_v1"}
  state_dict = {
    name: np.ones(shape, np.float32) for name, shape in model_shapes(s).items()
  }
  model, variables = interop.from_official_model(s, state_dict)
  assert model.config.spans == () and "buffers" not in variables
  assert_same_tensors(interop.to_official_model(s, variables), state_dict)


# Settings and files.

KINDS = {
  "ultramem_v1": {**SMALL, "value_expand_time": 4},
  "ultramem_v2": SMALL_V2,
  "memory_plus": SMALL_PLUS,
  "meta_memory": SMALL_META,
}
REFUSED = [
  ("ultramem_v1", "value_expand_time", 5),
  ("ultramem_v1", "head", 3),
  ("ultramem_v1", "layer_norm_type", "instance"),
  ("ultramem_v1", "attention_layer_norm_with_affine", False),
  ("ultramem_v2", "head", 5),
  ("ultramem_v2", "value_expand_time", 4),
  ("ultramem_v2", "mem_key_balance_reg_coef", 0.01),
  ("ultramem_v2", "mem_output_dropout_rate", 0.1),
  ("ultramem_v2", "share_ratio", 1.5),
  ("memory_plus", "layer_norm_type", "instance"),
  ("meta_memory", "peer_variant", True),
  ("meta_memory", "mem_query_batchnorm", True),
  ("meta_memory", "mem_value_dropout", 0.1),
  ("meta_memory", "output_dim", 21),
]


@pytest.mark.parametrize("kind,name,value", REFUSED)
def test_setting_that_we_cannot_express_is_refused_by_name(kind, name, value):
  with pytest.raises(ConfigError, match=rf"{name} = "):
    interop.to_official(kind, {}, **{**KINDS[kind], name: value})


@pytest.mark.parametrize(
  "kind,name",
  [
    ("ultramem_v1", "hidden_size"),
    ("ultramem_v2", "knum"),
    ("memory_plus", "knn"),
    ("meta_memory", "input_dim"),
  ],
)
def test_missing_setting_is_named(kind, name):
  settings = {k: v for k, v in KINDS[kind].items() if k != name}
  with pytest.raises(ConfigError, match=f"{name} = None: is missing"):
    interop.from_official(kind, {}, **settings)


def test_unknown_kind_is_refused():
  with pytest.raises(ConfigError, match="ultramem_v1, ultramem_v2, memory_pl"):
    interop.from_official("ultramem_v3", {}, **SMALL)


@pytest.mark.parametrize(
  "kind,settings",
  [
    # None of these is read by the layer, or only where there is more than it.
    (
      "ultramem_v1",
      dict(
        mem_key_expand_time=3,
        mem_key_balance_reg_coef=0.1,
        layer_id=2,
        mem_output_dropout_rate=0.1,
        mem_use_glu_act=True,
        mem_q_for_each_tucker_rank=True,
        tucker_rank_penalty=0.1,
      ),
    ),
    (
      "ultramem_v2",
      dict(
        vertical_parallel=True,
        mem_parallel_size=4,
        tucker_rank_penalty=0.1,
        mem_final_top_expand_time=2,
        mem_log_interval=5,
      ),
    ),
    (
      "memory_plus",
      dict(mem_key_expand_time=3, mem_output_dropout_rate=0.1, layer_id=2),
    ),
    ("meta_memory", dict(value_fixed_lr=0.1, mem_share_values=False)),
  ],
)
def test_setting_that_changes_nothing_is_ignored(kind, settings):
  s = KINDS[kind]
  state_dict = random_tensors(kind, s)
  one, _ = interop.from_official(kind, state_dict, **s)
  other, _ = interop.from_official(kind, state_dict, **s, **settings)
  assert one.config == other.config


@pytest.mark.parametrize(
  "name,value",
  [
    ("activation_type", "gelu"),
    ("block_type", "llama"),
    ("rope", False),
    ("norm_after", True),
    ("scale_logits", True),
    ("clip_qkv", 8.0),
    ("include_bias", True),
    ("residual_dropout", 0.1),
    ("n_kv_heads", 1),
    ("mem_insert_way", "2:1"),
    ("mem_insert_way", "0:1/0:2"),
    ("mem_insert_way", "0:2"),
    ("mem_insert_way", "5"),
    ("mem_type", "peer"),
    ("mem_output_dropout_rate", 0.1),
    ("d_model", None),
  ],
)
def test_model_setting_is_refused_by_name(name, value):
  s = {**MODEL, "mem_type": "ultramem_v2", name: value}
  if value is None:
    del s[name]
  with pytest.raises(ConfigError, match=rf"{name} = "):
    interop.from_official_model(s, {})


def test_faulty_tensors_are_listed_in_one_error():
  kind, s = "ultramem_v1", KINDS["ultramem_v1"]
  state_dict = random_tensors(kind, s)
  del state_dict["tucker_core.1"], state_dict["shuffle_index"]
  state_dict["keys"] = state_dict["keys"][:, :1]
  state_dict["bias"] = np.zeros(3)
  with pytest.raises(ConfigError) as error:
    interop.from_official(kind, state_dict, **s)
  for fault in (
    "tucker_core.1 is missing",
    "shuffle_index is missing",
    "keys has shape [1, 1, 10, 6, 2], must be [1, 2, 10, 6, 2]",
    "bias is unknown",
  ):
    assert fault in str(error.value)


def test_faulty_variables_are_listed_in_one_error():
  kind, s = "ultramem_v1", KINDS["ultramem_v1"]
  _, variables = interop.from_official(kind, random_tensors(kind, s), **s)
  params = {
    **variables["params"],
    "extra": np.zeros(2),
    "values": np.zeros((2, 12)),
  }
  del params["query"]
  with pytest.raises(ConfigError) as error:
    interop.to_official(kind, {"params": params}, **s)
  assert "row_multiple" not in str(error.value)
  for fault in (
    "params/query is missing",
    "params/extra is unknown",
    "params/values has shape [2, 12], must be [25, 12]",
  ):
    assert fault in str(error.value)


def test_rows_that_only_pad_a_table_are_named():
  kind, s = "ultramem_v1", KINDS["ultramem_v1"]
  _, variables = interop.from_official(kind, random_tensors(kind, s), **s)
  params = {**variables["params"], "values": np.zeros((32, 12))}
  with pytest.raises(ConfigError, match=r"row_multiple, give the first 25 ro"):
    interop.to_official(kind, {"params": params}, **s)


def safetensors(path, tensors):
  """Writes {name: (dtype, array)} in the safetensors format."""
  header, data = {"__metadata__": {"format": "pt"}}, b""
  for name, (dtype, array) in tensors.items():
    raw = array.tobytes()
    header[name] = {
      "dtype": dtype,
      "shape": array.shape,
      "data_offsets": [len(data), len(data) + len(raw)],
    }
    data += raw
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_safetensors_file(tmp_path):
  kind, s = "ultramem_v1", KINDS["ultramem_v1"]
  state_dict = random_tensors(kind, s)
  half = state_dict["values_for_look_up"].astype(jnp.bfloat16)
  state_dict["values_for_look_up"] = half.astype(np.float32)
  path = tmp_path / "layer.safetensors"
  dtypes = {"f": "F32", "i": "I64"}
  safetensors(
    path,
    {
      **{k: (dtypes[v.dtype.kind], v) for k, v in state_dict.items()},
      "values_for_look_up": ("BF16", half),
    },
  )
  _, variables = interop.from_official(kind, path, **s)
  assert_same_tensors(interop.to_official(kind, variables, **s), state_dict)
  for broken in (b"", b"\x05\0\0\0\0\0\0\0{broken", b"\2\0\0\0\0\0\0\0[]"):
    path.write_bytes(broken)
    with pytest.raises(ConfigError, match="is not a safetensors"):
      interop.from_official(kind, path, **s)


def test_other_files(tmp_path, monkeypatch):
  path = tmp_path / "layer.pt"
  with pytest.raises(ConfigError, match="is not a file"):
    interop.load(path)
  path.touch()
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ConfigError, match=r"reading \.pt needs torch"):
    interop.load(path)
  with pytest.raises(ConfigError, match=r"must end in \.safetensors or"):
    interop.load(tmp_path / "layer.npz")


def test_files_of_something_else_are_refused(tmp_path):
  torch = pytest.importorskip("torch")
  path = tmp_path / "layer.pt"
  path.write_bytes(b"broken")
  for _ in range(2):
    with pytest.raises(ConfigError, match=r"is not a \.pt file of ten"):
      interop.load(path)
    torch.save({"model": {"keys": torch.ones(2)}}, path)
  torch.save({"keys": torch.ones(2, dtype=torch.bfloat16)}, path)
  np.testing.assert_array_equal(interop.load(path)["keys"], np.ones(2))


def test_rank_and_cores_come_from_the_tensors_of_a_model():
  """The model's config says nothing of them."""
  _, s, state_dict, _, _ = golden("model_v1_skip")
  model, variables = interop.from_official_model(
    {**s, "tucker_rank": 5, "mem_value_expand_time": 9}, state_dict
  )
  memory = model.config.memory
  assert (memory.rank, memory.num_cores, memory.expansion) == (2, 2, 4)
  fields = dataclasses.asdict(model.config)
  assert fields["memory"]["spans"] == "1:2/3:4"
  assert variables["params"]["memory_1"]["core"].shape == (2, 2, 2, 2)
