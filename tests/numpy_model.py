"""The dense transformer once more, in numpy, from its definition."""

import jax
import numpy as np


def norm(c, params, x, kind=None):
  if (kind or c.norm) == "layernorm":
    x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
  return x * params["scale"] + params.get("bias", 0)


def rotate(c, x_TQH):
  """Pairs (i, i + H / 2) turned by position * theta^(-2 i / H)."""
  half = c.head_dim // 2
  rate_H = c.rope_theta ** (-np.arange(half) / half)
  turn_TH = np.exp(1j * np.arange(len(x_TQH))[:, None] * rate_H)
  z_TQH = (x_TQH[..., :half] + 1j * x_TQH[..., half:]) * turn_TH[:, None]
  return np.concatenate([z_TQH.real, z_TQH.imag], -1)


def attention(c, params, x_TD):
  query, key, value = (
    np.einsum("TD,DQH->TQH", x_TD, params[name]["kernel"])
    for name in ("query", "key", "value")
  )
  if c.qk_norm == "head":
    query = norm(c, params["query_norm"], query, "rms")
    key = norm(c, params["key_norm"], key, "rms")
  query, key = rotate(c, query), rotate(c, key)
  score_QTS = np.einsum("TQH,SQH->QTS", query, key) / c.head_dim**0.5
  weight_QTS = np.exp(score_QTS) * np.tri(len(x_TD))
  weight_QTS /= weight_QTS.sum(-1, keepdims=True)
  y_TQH = np.einsum("QTS,SQH->TQH", weight_QTS, value)
  return np.einsum("TQH,QHD->TD", y_TQH, params["out"]["kernel"])


def mlp(c, params, x_TD):
  h_TF = x_TD @ params["up"]["kernel"]
  if c.activation == "swiglu":
    gate_TF = x_TD @ params["gate"]["kernel"]
    h_TF *= gate_TF / (1 + np.exp(-gate_TF))
  else:  # the tanh form of GELU
    inner = np.sqrt(2 / np.pi) * (h_TF + 0.044715 * h_TF**3)
    h_TF *= 0.5 * (1 + np.tanh(inner))
  return h_TF @ params["down"]["kernel"]


def convolution(params, x_TD):
  """y[t] = sum_j w[j] * x[t - j]."""
  y_TD = np.zeros_like(x_TD)
  for t in range(len(x_TD)):
    for j, w_D in enumerate(params["kernel"][: t + 1]):
      y_TD[t] += w_D * x_TD[t - j]
  return y_TD


def dense(c, params, tokens_T):
  """Logits [T, V] of a whole model."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  embedding_VD = params["embed"]["embedding"]
  x_TD = embedding_VD[tokens_T]
  for layer in range(c.num_layers):
    p = params[f"block_{layer}"]
    h_TD = norm(c, p["attention_norm"], x_TD)
    x_TD = x_TD + attention(c, p["attention"], h_TD)
    h_TD = norm(c, p["mlp_norm"], x_TD)
    if "mlp_conv" in p:
      h_TD = convolution(p["mlp_conv"], h_TD)
    x_TD = x_TD + mlp(c, p["mlp"], h_TD)
    if "adapter" in p:
      x_TD = x_TD + mlp(c, p["adapter"], h_TD)
  x_TD = norm(c, params["final_norm"], x_TD)
  if c.tie_embeddings:
    return x_TD @ embedding_VD.T
  return x_TD @ params["head"]["kernel"]
