"""Text as batches of tokens: `corpus = data.open(config)`."""

from ultramem_jax.data.corpus import Corpus, open

__all__ = ["Corpus", "open"]
