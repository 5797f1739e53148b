"""Where tables lie: which settings are refused."""

from tests.settings import refusals

PATH = "model.memory.storage"


@refusals.cases(
  [
    ({f"{PATH}.partition": "x"}, f"{PATH}.partition", "one of auto"),
    (
      {f"{PATH}.table_dtype": "float16"},
      f"{PATH}.table_dtype",
      "one of float32",
    ),
    ({f"{PATH}.kernel": "x"}, f"{PATH}.kernel", "one of xla"),
    ({f"{PATH}.row_multiple": 0}, f"{PATH}.row_multiple", "at least 1"),
    ({f"{PATH}.row_multiple": "2"}, f"{PATH}.row_multiple", "of type int"),
    ({f"{PATH}.typo": 1}, f"{PATH}.typo", "no such field; known: partition, "),
    ({PATH: 1}, PATH, "must hold the fields partition, "),
  ]
)
def test_bad_values_are_named(changes, field, allowed):
  refusals.assert_refused(changes, field, allowed)
