"""An id has a row of its own from its eighth sighting on; before that it shares one of 10,000 rows of its column."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = base.get_config()
  config.embedding.kind = 'adaptive'
  config.embedding.buckets = (10_000,)
  config.embedding.admission.name = 'counter'
  return config
