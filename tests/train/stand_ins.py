"""Stand-ins for the devices of several hosts, as far as a mesh asks."""

import itertools


class Device:
  """A device of several hosts, as far as a mesh asks about it."""

  core_on_chip = 0

  def __init__(self, number, kind, process, slice_index=0, coords=(0, 0, 0)):
    self.id, self.process_index = number, process
    self.device_kind, self.slice_index, self.coords = kind, slice_index, coords
    self.platform = "tpu" if kind.startswith("TPU") else "gpu"


def gpus(hosts, of_each):
  """JAX calls every host of GPUs a slice."""
  return [
    Device(i, "NVIDIA H100 80GB HBM3", i // of_each, i // of_each)
    for i in range(hosts * of_each)
  ]


def tpus(kind, *sides, slices=1):
  """Slices of a torus [x, y, z], with four chips to a host."""
  places = list(itertools.product(*map(range, reversed(sides))))
  return [
    Device(i, kind, i // 4, i // len(places), (*reversed(place), 0, 0)[:3])
    for i, place in enumerate(places * slices)
  ]
