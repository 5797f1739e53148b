"""What benchmarks.layer measures: parts, and their cases."""

OURS, OURS_DENSE, OUR_LOOKUP = "ours", "ours dense", "our lookup"
IN_JAX = (OURS, OURS_DENSE, OUR_LOOKUP, "take + einsum")
# The tokens of each part, and its cases in JAX and in torch.
PARTS = {
  "gather": ((1, 8, 64, 512, 2048), (OURS, "take + einsum", "embedding_bag")),
  "forward": ((1, 64, 512, 2048), (OURS, "ultra-mem", "ultra-mem compiled")),
  "backward": (
    (64, 512),
    (
      OURS,
      "ultra-mem",
      "embedding_bag dense",
      "embedding_bag sparse",
      OURS_DENSE,
    ),
  ),
  "step": (
    (512,),
    (
      OURS,
      "ultra-mem AdamW",
      OUR_LOOKUP,
      "embedding_bag Adam",
      "embedding_bag SparseAdam",
    ),
  ),
}


def own_case(part: str, peer: str) -> str:
  """Returns which case of ours a peer's time is compared with."""
  is_lookup = part == "step" and peer.startswith("embedding_bag")
  return OUR_LOOKUP if is_lookup else OURS
