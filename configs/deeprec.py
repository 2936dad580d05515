"""The flags of DeepRec's modelzoo/DLRM/train.py: --config="configs/deeprec.py:--bf16 --optimizer=adagrad".

The only place that knows the old names and values. Three things differ from base: 10,000 buckets for every column and
a learning rate of 0.01, as in their script; and `--tf`, which turns DeepRec's features off. Under TF_CONFIG,
batch_size is that of one worker.
"""

import argparse
import json
import logging
import os
import re
import shlex
from typing import NoReturn

from ml_collections import ConfigDict

from configs import base


class Parser(argparse.ArgumentParser):
  """Raises where argparse would exit."""

  def error(self, message: str) -> NoReturn:
    """ValueError with the known flags where one is unknown."""
    if message.startswith('unrecognized'):
      message += '; known are ' + ' '.join(sorted(self._option_string_actions))
    raise ValueError(f'configs/deeprec.py: {message}')


def _boolean(text: str) -> bool:
  values = {'true': True, 't': True, 'yes': True, '1': True, 'false': False, 'f': False, 'no': False, '0': False}
  if text.lower() not in values:
    raise argparse.ArgumentTypeError(f'{text!r} is neither true nor false')
  return values[text.lower()]


def _optional(*names: str) -> dict:
  convert = lambda text: None if text in ('None', 'none', '') else text
  return {'type': convert, 'default': None, 'choices': [None, *names]}


def parser() -> argparse.ArgumentParser:
  """The seed's flags with the seed's defaults."""
  p = Parser(prog='deeprec', allow_abbrev=False, add_help=False)
  switch = lambda name, default: p.add_argument(name, type=_boolean, nargs='?', const=True, default=default)
  p.add_argument('--data_location', default='./data')
  p.add_argument('--steps', type=int, default=0)
  p.add_argument('--batch_size', type=int, default=512)
  p.add_argument('--output_dir', default='./result')
  p.add_argument('--checkpoint', default='')
  p.add_argument('--save_steps', type=int, default=0)
  p.add_argument('--seed', type=int, default=2021)
  optimizers = ['adam', 'adamasync', 'adagraddecay', 'adagrad', 'gradientdescent']
  p.add_argument('--optimizer', default='adamasync', choices=optimizers)
  p.add_argument('--learning_rate', type=float, default=0.01)
  p.add_argument('--keep_checkpoint_max', type=int, default=1)
  p.add_argument('--timeline', type=int, default=0)
  p.add_argument('--interaction_op', default='cat', choices=['dot', 'cat'])
  p.add_argument('--inter', type=int, default=0)
  p.add_argument('--intra', type=int, default=0)
  p.add_argument('--input_layer_partitioner', type=int, default=8)
  p.add_argument('--dense_layer_partitioner', type=int, default=16)
  p.add_argument('--deep_dropout', type=float)
  p.add_argument('--micro_batch', type=int, default=0)
  p.add_argument('--incremental_ckpt', type=int, default=0)
  p.add_argument('--protocol', default='grpc', choices=['grpc', 'grpc++', 'star_server'])
  p.add_argument('--ev_elimination', **_optional('l2', 'gstep'))
  p.add_argument('--ev_filter', **_optional('counter', 'cbf'))
  for name in ('bf16', 'tf', 'no_eval', 'ev', 'adaptive_emb', 'dynamic_ev', 'workqueue'):
    switch(f'--{name}', False)
  for name in ('emb_fusion', 'op_fusion', 'smartstaged'):
    switch(f'--{name}', True)
  return p


def get_config(flags: str = '') -> ConfigDict:
  """The experiment that these flags name."""
  try:
    words = shlex.split(re.sub(r'\\\r?\n', ' ', flags))  # as a shell joins lines
  except ValueError as error:
    raise ValueError(f'configs/deeprec.py: {error} in {flags!r}') from None
  args = parser().parse_args(words)
  config = base.get_config()
  same = ('data_location', 'steps', 'batch_size', 'output_dir', 'checkpoint', 'save_steps', 'seed', 'no_eval')
  for name in (*same, 'keep_checkpoint_max', 'timeline', 'inter', 'intra', 'smartstaged', 'op_fusion'):
    config[name] = getattr(args, name)
  workers = _workers()
  config.batch_size *= workers
  config.data.streams = max(config.data.streams, workers)
  _transport(args.protocol)
  if args.deep_dropout is not None:
    logging.getLogger(__name__).warning('--deep_dropout has no effect here, as it has none in DeepRec')
  config.delta_seconds = float(args.incremental_ckpt)
  config.micro_batch = args.micro_batch or 1
  config.data.workqueue = args.workqueue
  config.optimizer.name = args.optimizer
  config.optimizer.learning_rate = args.learning_rate
  config.model.interaction = args.interaction_op
  config.model.dtype = config.model.reduce_dtype = 'bfloat16' if args.bf16 else 'float32'
  config.model.shard_kb = float(args.dense_layer_partitioner)
  config.embedding.shard_mb = float(args.input_layer_partitioner)
  config.embedding.fusion = args.emb_fusion
  config.embedding.buckets = (10_000,)
  if args.tf:
    _community_tensorflow(config)
  else:
    _embedding_variables(config, args)
  return config


def _workers() -> int:
  # Under TF_CONFIG their batch size is that of one worker; here it is that of all. What is wrong with TF_CONFIG, main
  # says: dlrm_jax.distributed reads it.
  try:
    jobs = json.loads(os.environ.get('TF_CONFIG') or '{}')['cluster']
    workers = len(jobs.get('chief', ())) + len(jobs.get('worker', ()))
  except (ValueError, KeyError, TypeError, AttributeError):
    return 1
  if workers > 1:
    logging.getLogger(__name__).warning('batch_size is multiplied by the %d workers of TF_CONFIG', workers)
  return max(1, workers)


def _transport(name: str) -> None:
  # config.protocol stays at gloo, whatever the name.
  if name != 'grpc' or os.environ.get('TF_CONFIG'):
    logging.getLogger(__name__).warning('--protocol=%s: processes exchange arrays by Gloo, over TCP', name)


# Steps between evictions and between widths where no checkpoints are written before the end.
EVERY = 1000


def _embedding_variables(config: ConfigDict, args: argparse.Namespace) -> None:
  # There, filter and eviction are ignored without a word where no ids are known; and of the three kinds, one wins.
  embedding, known = config.embedding, args.ev or args.adaptive_emb or args.dynamic_ev
  for name in ('ev_filter', 'ev_elimination'):
    if getattr(args, name) and not known:
      raise ValueError(f'configs/deeprec.py: --{name}={getattr(args, name)} needs --ev, --adaptive_emb or --dynamic_ev')
  if not known:
    return
  if args.ev and args.adaptive_emb:
    raise ValueError('configs/deeprec.py: --ev gives every id a row, --adaptive_emb only frequent ones; leave one out')
  embedding.kind = 'adaptive' if args.adaptive_emb else 'dynamic'
  if args.ev_filter or args.adaptive_emb:
    embedding.admission.name = 'counting_bloom' if args.ev_filter == 'cbf' else 'counter'
    embedding.admission.threshold = 3 if args.ev_filter else 8
  if args.ev_elimination:
    embedding.eviction.name = {'l2': 'l2', 'gstep': 'global_step'}[args.ev_elimination]
  if args.dynamic_ev:
    embedding.width.name = 'dynamic'
  if not args.save_steps:
    embedding.eviction.every = embedding.width.every = EVERY


def _community_tensorflow(config: ConfigDict) -> None:
  # There, too, it wins over whatever other flags say.
  config.model.dtype = config.model.reduce_dtype = 'float32'
  config.embedding.fusion = False
  config.smartstaged = False
  config.data.workqueue = False
  config.micro_batch = 1
  config.op_fusion = False
  config.optimizer.name = 'adam'
  config.optimizer.table_update = 'all'
