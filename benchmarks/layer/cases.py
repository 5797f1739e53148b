"""What benchmarks.layer measures: parts, their cases, and the targets."""

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
# (part, peer, tokens): how many times faster than the peer ours is to be
# without huge pages.
TARGETS = {
  **{("gather", "embedding_bag", t): 1 / 1.15 for t in (64, 512, 2048)},
  **{("gather", "take + einsum", t): 6.0 for t in (512, 2048)},
  ("forward", "ultra-mem", 1): 5.0,
  ("forward", "ultra-mem", 64): 2.3,
  ("forward", "ultra-mem", 512): 2.3,
  ("forward", "ultra-mem", 2048): 2.5,
  **{("forward", "ultra-mem compiled", t): 1.0 for t in (1, 64, 512, 2048)},
  ("backward", "ultra-mem", 64): 14.0,
  ("backward", "ultra-mem", 512): 6.0,
  ("step", "ultra-mem AdamW", 512): 5.0,
  ("step", "embedding_bag Adam", 512): 12.0,
  ("step", "embedding_bag SparseAdam", 512): 4.0,
}


def own_case(part: str, peer: str) -> str:
  """Returns which case of ours a peer's time is compared with."""
  is_lookup = part == "step" and peer.startswith("embedding_bag")
  return OUR_LOOKUP if is_lookup else OURS
