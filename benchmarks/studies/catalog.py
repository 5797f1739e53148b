"""The studies by name, in the order in which they are run."""

from benchmarks.studies import (
  anatomy,
  inside,
  knowledge,
  quality,
  scale,
  steps,
  table_size,
)

PROBES = {knowledge.PROBE: knowledge.probe, inside.PROBE: inside.probe}
STUDIES = {
  "anatomy": anatomy.STUDY,
  "quality": quality.STUDY,
  "ladder": steps.LADDER_STUDY,
  "table_size": table_size.STUDY,
  "sweeps": steps.SWEEPS_STUDY,
  "scale": scale.STUDY,
  "knowledge": knowledge.STUDY,
  "inside": inside.STUDY,
}
