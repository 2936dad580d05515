"""Embedding variables: no vocabulary, a row for every id that comes; the tables double when they are full."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = base.get_config()
  config.embedding.kind = 'dynamic'
  return config
