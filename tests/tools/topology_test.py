"""Names of devices, whether or not their compiler is installed."""

import importlib.util
import re

import pytest

from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.tools import topology

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
HAS_GPU_PLUGIN = importlib.util.find_spec("jax_cuda12_plugin") is not None
needs_libtpu = pytest.mark.skipif(
  not HAS_LIBTPU, reason="libtpu is missing: pip install -e '.[tpu-compile]'"
)


@pytest.mark.parametrize(
  "name, expected",
  [
    ("v9:2x2", "topology = 'v9:2x2': must be like v5e:16x16, h100:8, cpu:8 or"),
    ("h100", "topology = 'h100': must be like"),
    ("h100:1x2x4", "topology = 'h100:1x2x4': must be like"),
    ("v5e", "topology = 'v5e': must be like"),
    ("v4:4x4", "topology = 'v4:4x4': v4 takes 3 sides, such as v4:4x4x4"),
    ("v5e:4x0", "topology = 'v5e:4x0': must be like"),
    ("cpu:0", "topology = 'cpu:0': must be like"),
    ("cpu:many", "topology = 'cpu:many': must be like"),
  ],
)
def test_bad_topologies_are_refused(name, expected):
  with pytest.raises(ConfigError, match=re.escape(expected)):
    topology.devices(name)


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_it_says_how_to_install_it():
  with pytest.raises(ConfigError, match=r"needs libtpu.*pip install"):
    topology.devices("v5e:2x2")


@pytest.mark.skipif(HAS_GPU_PLUGIN, reason="jax_cuda12_plugin is installed")
def test_without_the_gpu_plugin_it_says_how_to_install_it():
  with pytest.raises(ConfigError, match=r"needs JAX's plugin.*pip install"):
    topology.devices("h100:8")


@needs_libtpu
def test_a_tpu_layout_that_cannot_be_is_refused():
  with pytest.raises(ConfigError, match=r"v5e:3x3.*not divis"):
    topology.devices("v5e:3x3")
  assert len(topology.devices("v5e:2x4")) == 8
  assert len(topology.devices("v5e:1x1")) == 1
  assert len(topology.devices("v4:2x2x1")) == 4  # chips, not their cores
