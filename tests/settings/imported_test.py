"""Parts that only imported weights have: which settings are refused."""

from tests.settings import refusals

PATH = "model.memory.imported"


@refusals.cases(
  [
    ({f"{PATH}.spare_queries": -1}, f"{PATH}.spare_queries", "at least 0"),
    ({f"{PATH}.norm_bias": 1}, f"{PATH}.norm_bias", "of type bool"),
    (
      {f"{PATH}.output_gate": True},
      f"{PATH}.output_gate",
      "is for kind = 'memory_plus'",
    ),
  ]
)
def test_bad_values_are_named(changes, field, allowed):
  refusals.assert_refused(changes, field, allowed)
