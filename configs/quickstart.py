"""Small tables for a first run on the synthetic data of `make train`: about a minute on two cores."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = base.get_config()
  # Large tables pay off with millions of rows; these start at once and take 0.2 GB.
  config.embedding.buckets = tuple(min(buckets, 100_000) for buckets in base.BUCKETS)
  config.model.dtype = 'bfloat16'
  return config
