"""The seed's --tf, the community baseline: no fusion, no staging, Adam that moves every row every step, float32."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """See the top of the file."""
  config = base.get_config()
  config.embedding.fusion = False
  config.embedding.buckets = (10_000,)
  config.smartstaged = False
  config.op_fusion = False
  config.optimizer.name = 'adam'
  config.optimizer.table_update = 'all'
  return config
