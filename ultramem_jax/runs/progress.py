"""How far a run is, on the console."""

import sys
import time

import jax
import tqdm


class Progress:
  """Shows how far a run is: a bar on a terminal, elsewhere a line per update.

  Args:
    start: the step the run starts from.
    total: steps of the whole run.
  """

  def __init__(self, start: int, total: int):
    self._start, self._total = start, total
    self._began = time.monotonic()
    self._shown = jax.process_index() == 0
    self._bar = None
    if self._shown and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        initial=start,
        total=total,
        unit="step",
        file=sys.stderr,
        dynamic_ncols=True,
      )

  def update(self, step: int, loss: float, tokens_per_second: float) -> None:
    """Shows a step, its loss, the speed and the time left."""
    state = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s"
    if self._bar is not None:
      self._bar.set_postfix_str(state, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    done = max(step - self._start, 1)
    left = (self._total - step) * (time.monotonic() - self._began) / done
    self.note(
      f"step {step}/{self._total}: {state}, "
      f"{tqdm.tqdm.format_interval(left)} left"
    )

  def note(self, text: str) -> None:
    """Shows a line, above the bar if there is one."""
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    elif self._shown:
      print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()
