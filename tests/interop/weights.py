"""Weights in the authors' layouts: goldens, and random ones of small layers."""

import functools
import json
import math
import pathlib

import numpy as np

from tests.interop import authors

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
CLASSES = {
  "UltraMemLayerV1": "ultramem_v1",
  "UltraMemLayerV2": "ultramem_v2",
  "MemoryLayerPlus": "memory_plus",
}


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
      if key.replace(authors.TABLE[:-1] + "/", "").startswith(f"{kind}/")
    }

  kind = CLASSES.get(info.get("cls"))
  return kind, settings, named("param", "buffer"), named("grad"), arrays


def assert_same_tensors(actual, expected):
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(
      actual[name], array.astype(actual[name].dtype), err_msg=name
    )


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


def meta_shapes(s):
  """Of every tensor of Meta's layer."""
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


def shapes(kind, s):
  """Of every tensor of a layer, in the authors' layouts."""
  if kind == "meta_memory":
    return meta_shapes(s)
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
      f"{authors.TABLE}values_for_look_up": (keys**2, value),
    }
  table = "values_for_look_up"
  pairs, rows, side, expand = 1, keys**2, keys, s.get("value_expand_time")
  sides = math.isqrt(expand)
  if kind == "ultramem_v2":
    table = authors.TABLE + table
    pairs = rank if s["mem_q_for_each_tucker_rank"] else 1
    rows *= s["mem_layer_num"]
    side = int((rows * s["share_ratio"]) ** 0.5)
    sides = s["mem_key_expand_time"]
    if s["pre_vdim"]:
      found["pre_values_proj.weight"] = (s["pre_vdim"], width)
      found[f"{authors.TABLE}pre_values_for_look_up"] = (rows, s["pre_vdim"])
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


KINDS = {
  "ultramem_v1": {**SMALL, "value_expand_time": 4},
  "ultramem_v2": SMALL_V2,
  "memory_plus": SMALL_PLUS,
  "meta_memory": SMALL_META,
}
