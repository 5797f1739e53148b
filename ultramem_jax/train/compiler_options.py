"""The options of XLA that a training or decoding step is compiled with.

They let the compiler run a memory's look-up and communication beside the dense
layers between its reading and its adding (`model`), none of which depends on
it. What it makes of them: `python -m ultramem_jax compile`, which prints what
the compiled schedule runs beside each collective.

On a TPU the latency-hiding scheduler, and all-gathers and permutes that run
beside matmuls, are on as libtpu comes; all-to-alls, with which a split table's
rows travel, are not, nor are reduce-scatters on the SparseCores of the chips
that have them (on others they hold up the matmuls). On a GPU the scheduler has
to be asked for.
"""

import jax

TPU = {"xla_tpu_enable_async_all_to_all": True}
SPARSE_CORE = {
  **TPU,
  "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
}
GPU = {"xla_gpu_enable_latency_hiding_scheduler": True}

# By kind of device; a TPU not named here has no SparseCore that takes
# collectives.
KINDS = {"TPU v6 lite": SPARSE_CORE, "TPU7x": SPARSE_CORE}


# Without it, sums on a GPU may be taken in another order in every run.
DETERMINISTIC = {"gpu": {"xla_gpu_exclude_nondeterministic_ops": True}}


def for_device(
  device: jax.Device,  # pyright: ignore[reportInvalidTypeForm]
  deterministic: bool = False,
) -> dict[str, bool]:
  """Returns the options for programs of a mesh of such devices.

  Args:
    device: one of them.
    deterministic: the same program and input give the same bits.
  """
  platforms = {"tpu": TPU, "gpu": GPU}
  options = KINDS.get(device.device_kind, platforms.get(device.platform, {}))
  if deterministic:
    options = options | DETERMINISTIC.get(device.platform, {})
  return options
