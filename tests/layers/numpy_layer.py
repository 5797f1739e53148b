"""The UltraMem layer once more, in numpy: a token and a head at a time."""

import jax
import numpy as np

from ultramem_jax.ops import shuffle


def norm(c, scale_K, x):
  if c.query_key_norm == "none":
    return x
  if c.query_key_norm == "layernorm":
    x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale_K


def top(score, m):
  return np.argsort(-score, axis=None, kind="stable")[:m]


def cells(c, row_RN, column_RN, core_CRR, u_R, t_R):
  """Rows, columns and scores [M, C] of the cells that one head reads."""
  if c.score == "sum":
    grid_CNN = (row_RN[0][:, None] + column_RN[0])[None]
    candidate_NN = np.ones(grid_CNN.shape[1:], bool)
  else:
    grid_CNN = np.einsum("Rm,CRr,rn->Cmn", row_RN, core_CRR, column_RN)
    candidate_NN = np.zeros(grid_CNN.shape[1:], bool)
    kept = (top(x, c.top_m) for x in (u_R @ row_RN, t_R @ column_RN))
    candidate_NN[np.ix_(*kept)] = True
  cell_M = top(np.where(candidate_NN, grid_CNN.sum(0), -np.inf), c.top_m)
  row_M, column_M = np.divmod(cell_M, c.grid_side)
  return row_M, column_M, grid_CNN[:, row_M, column_M].T


def slots(layer, row_M, column_M, buffers):
  c = layer.config
  if c.shuffle == "hash":
    return np.asarray(
      shuffle.hash_shuffle(
        row_M.astype(np.int32),
        column_M.astype(np.int32),
        c.grid_side,
        layer.layer_index,
      )
    )
  cell_M = row_M * c.grid_side + column_M
  return cell_M if c.shuffle == "none" else buffers["permutation"][cell_M]


def output(layer, variables, x_BTD):
  c = layer.config
  as_float64 = lambda x: np.asarray(x, np.float64)
  params = jax.tree.map(as_float64, variables["params"])
  buffers = {k: np.asarray(v) for k, v in variables.get("buffers", {}).items()}
  scale = lambda name: params[name]["scale"] if name in params else None
  keys_PARNK = norm(c, scale("key_norm"), params["keys"])
  read_BTD = as_float64(x_BTD)
  if c.query_conv:
    kernel_JD = params["query_conv"]["kernel"]
    past_BTD = np.pad(read_BTD, [(0, 0), (c.query_conv - 1, 0), (0, 0)])
    read_BTD = sum(
      kernel_JD[j] * past_BTD[:, c.query_conv - 1 - j :][:, : x_BTD.shape[1]]
      for j in range(c.query_conv)
    )
  query_BTPGRK = norm(
    c,
    scale("query_norm"),
    np.einsum("BTD,DPGRK->BTPGRK", read_BTD, params["query"]),
  )
  query_BTPARK = np.repeat(query_BTPGRK, c.heads_per_query, 3)
  side_BTPARN = np.einsum("BTPARK,PARNK->BTPARN", query_BTPARK, keys_PARNK)
  output_BTD = np.zeros(x_BTD.shape)
  for b, t in np.ndindex(x_BTD.shape[:2]):
    pooled_EW = np.zeros((c.expansion, c.value_dim))
    for a in range(c.num_heads):
      tucker_parts = (None, None, None)
      if c.score == "tucker":
        core_CRR = params["core"][:, a]
        tucker_parts = (core_CRR, buffers["u"][a], buffers["t"][a])
      row_M, column_M, score_MC = cells(
        c, *side_BTPARN[b, t, :, a], *tucker_parts
      )
      if c.softmax:
        score_MC = np.exp(score_MC) / np.exp(score_MC).sum(0)
      for slot, score_C in zip(
        slots(layer, row_M, column_M, buffers), score_MC, strict=True
      ):
        weight_W = np.repeat(score_C, c.value_dim // c.num_cores)
        value_W = params["values"][slot % c.num_rows]
        pooled_EW[slot // c.num_rows] += weight_W * value_W
    if c.value_projection:
      output_BTD[b, t] = np.einsum(
        "EW,EWD->D", pooled_EW, params["value_projection"]
      )
    else:
      output_BTD[b, t] = pooled_EW[0]
  return output_BTD
