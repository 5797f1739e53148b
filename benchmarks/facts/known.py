"""What a model knew before: does it still know it?

Perplexity of general text hardly notices when a model has begun to answer other
questions with what it was taught. So it is asked for capitals.
"""

from benchmarks.facts import recall
from ultramem_jax.data.tokenizer import Tokenizer
from ultramem_jax.serve.load import TrainedModel

PROMPTS = ("The capital of {} is", "The capital city of {} is called")
CAPITALS = {
  "Austria": "Vienna",
  "Australia": "Canberra",
  "Belgium": "Brussels",
  "Canada": "Ottawa",
  "Chile": "Santiago",
  "China": "Beijing",
  "Colombia": "Bogot",  # with an accent, or without
  "Cuba": "Havana",
  "Denmark": "Copenhagen",
  "Egypt": "Cairo",
  "Finland": "Helsinki",
  "France": "Paris",
  "Germany": "Berlin",
  "Greece": "Athens",
  "Hungary": "Budapest",
  "India": "New Delhi",
  "Iran": "Tehran",
  "Ireland": "Dublin",
  "Italy": "Rome",
  "Japan": "Tokyo",
  "Kenya": "Nairobi",
  "Norway": "Oslo",
  "Peru": "Lima",
  "Poland": "Warsaw",
  "Portugal": "Lisbon",
  "Russia": "Moscow",
  "South Korea": "Seoul",
  "Spain": "Madrid",
  "Sweden": "Stockholm",
  "Thailand": "Bangkok",
}
TOKENS = 8  # of an answer


def share(loaded: TrainedModel, tokenizer: Tokenizer) -> float:
  """Returns the share of capitals that a model names at once, greedily."""
  asked = [
    (prompt.format(country), capital)
    for prompt in PROMPTS
    for country, capital in CAPITALS.items()
  ]
  told = recall.answers(loaded, tokenizer, [x for x, _ in asked], TOKENS)
  right = [
    text.strip().startswith(capital)
    for text, (_, capital) in zip(told, asked, strict=True)
  ]
  return sum(right) / len(right)
