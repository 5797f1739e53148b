"""How tokens are drawn: which settings are refused, and by which name."""

import pytest

from configs import tiny
from tests.settings import refusals
from ultramem_jax.settings import config
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.sampling import Sampling


@refusals.cases(
  [
    ({"sample.num_tokens": -1}, "sample.num_tokens", "at least 0"),
    ({"sample.temperature": -1.0}, "sample.temperature", "at least 0"),
    ({"sample.top_k": -1}, "sample.top_k", "at least 0"),
    *(
      ({"sample.top_p": value}, "sample.top_p", "in (0, 1]")
      for value in (0.0, 1.5)
    ),
  ]
)
def test_bad_values_are_named(changes, field, allowed):
  refusals.assert_refused(changes, field, allowed)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(num_tokens=-1), "num_tokens = -1: must be at least 0"),
    (dict(temperature=-1.0), "temperature = -1.0: must be at least 0"),
    (dict(temperature=float("nan")), "temperature = nan: must be finite"),
    (dict(top_k=-1), "top_k = -1: must be at least 0"),
    (dict(top_k=1.5), "top_k = 1.5: must be of type int"),
    (dict(top_p=2.0), "top_p = 2.0: must lie in (0, 1]; 1 keeps every token"),
  ],
)
def test_sampling_names_its_field(values, message):
  with pytest.raises(ConfigError) as error:
    Sampling(**{"num_tokens": 3, **values})
  assert str(error.value) == message


def test_a_sample_is_a_prompt_and_a_sampling():
  sample = config.parse(tiny.get_config()).sample
  assert sample.sampling == Sampling(
    sample.num_tokens, sample.temperature, sample.top_k, sample.top_p
  )
