"""Dot products between the vectors, as in the drawing of the model; the seed's default is to concatenate them."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = base.get_config()
  config.model.interaction = 'dot'
  return config
