"""Every field of an experiment: unit, default, meaning. The other files in this folder are short diffs of this one."""

from ml_collections import ConfigDict

# Buckets of C1..C26, 19,044,490 in all: DeepRec's per-column table with C13 and C15 swapped (misaligned there).
BUCKETS = (
  2500, 2000, 5000000, 1500000, 1000, 100, 20000, 4000, 20, 100000, 10000, 5000000, 100,
  100, 40000, 3000000, 50, 10000, 4000, 20, 4000000, 100, 100, 250000, 400, 100000,
)  # fmt: skip


def get_config() -> ConfigDict:
  """The whole DLRM on Criteo-format CSVs: one epoch, then exact AUC over all of the evaluation file."""
  c = ConfigDict()

  # The run.
  c.data_location = './data'  # folder of the training and evaluation files
  c.output_dir = './result'  # a run writes into output_dir/model_DLRM_<timestamp>
  c.checkpoint = ''  # folder to write into instead; when it holds checkpoints, the run resumes from the newest good one
  c.seed = 2021  # of the initial weights and of the order of the data
  c.batch_size = 512  # examples of one step, over all processes
  c.steps = 0  # stop at this step of the model's life; 0: train `epochs` instead
  c.epochs = 1  # passes over the training data, used when steps is 0
  c.micro_batch = 1  # slices of a batch that go through the top MLP one after another: same numbers, less memory
  c.no_eval = False  # True: never evaluate
  c.eval_every = 0  # steps between evaluations; 0: only at the end
  c.log_every = 100  # steps between lines of log, metrics.jsonl and event file
  c.save_steps = 0  # steps between checkpoints; 0: only at the end
  # seconds between checkpoints of the table rows that changed since the last whole one, and of all that is no table;
  # 0: none. Takes 8 bytes of memory a row
  c.delta_seconds = 0.0
  c.keep_checkpoint_max = 1  # newest whole checkpoints kept; 0: all
  c.timeline = 0  # steps between jax.profiler traces of one step; 0: none
  c.smartstaged = True  # parse, hash and place batches in the background, ahead of the step
  c.op_fusion = True  # XLA's fusion passes; False only to see what they are worth
  c.native = True  # C++ kernels, built at first use where there is a compiler; False: none. Same numbers
  c.inter = 0  # threads that parse and hash; 0: one
  c.intra = 0  # threads of XLA; 0: one per core
  c.protocol = 'gloo'  # between the processors of several processes. gloo: TCP; mpi: needs an MPI library
  c.watchdog_seconds = 120  # without a finished step, after which a run is ended as stuck; 0: never

  # The data: label, I1..I13, C1..C26 in each row.
  c.data = ConfigDict()
  c.data.train = 'train.csv'  # file names or globs under data_location, comma-separated; .csv or .parquet
  c.data.eval = 'eval.csv'  # likewise
  c.data.streams = 16  # regions of the training data that are read side by side; fixes the order of the data
  c.data.shuffle_rows = 20480  # rows of a stream that are shuffled together (at least 20000); 0: file order
  # True: no streams; slices of the data go to the process that has least left to read, so slow readers get fewer
  c.data.workqueue = False
  c.data.slice_rows = 20480  # of a slice, which are shuffled together unless shuffle_rows is 0
  c.data.dense_transform = 'log'  # of I1..I13. log: sign(x) log(1 + |x|); minmax: (x - min) / range; none
  c.data.on_bad_row = 'error'  # error: stop, naming file, line and field; skip: leave it out and count it
  c.data.cache = False  # True: parse once into an Arrow cache (264 bytes a row) beside the files, and read that

  # The model: bottom MLP on the integers, 26 embeddings, interaction, top MLP, one logit.
  c.model = ConfigDict()
  c.model.bottom_mlp = (512, 256, 64, 16)  # units per layer: Dense, ReLU, batch norm
  c.model.top_mlp = (512, 256)  # units per hidden layer: Dense, ReLU; one logit follows
  c.model.batch_norm = True  # in the bottom MLP, after the ReLU
  c.model.interaction = 'cat'  # cat: concatenate; dot: also all dot products between the 27 vectors
  c.model.shard_kb = 0.0  # several devices share out parameters of so many KB or more; 0: every one holds all of them
  c.model.dtype = 'float32'  # operands of the MLPs' matrix products: float32 or bfloat16 (sums are always float32)
  c.model.reduce_dtype = 'float32'  # the MLPs' gradients as devices send them: float32; bfloat16: half the bytes

  # The embedding tables.
  c.embedding = ConfigDict()
  # static: row = Fingerprint64(string) mod buckets; multi_hash: two rows of shorter tables stand for that row; dynamic:
  # embedding variables, a row for each id that comes, without buckets; adaptive: a dynamic row for an id that admission
  # lets in, and before that the shared row of its bucket.
  c.embedding.kind = 'static'
  c.embedding.dim = 16  # width of a vector
  c.embedding.buckets = BUCKETS  # rows of C1..C26; a tuple of one number stands for 26 times that number
  c.embedding.dtype = 'float32'  # of rows and slots; bfloat16: half the memory, rounded at random when written
  c.embedding.fusion = True  # True: one table for all 26 columns; False: one each. Same numbers
  c.embedding.l2 = 0.0  # adds l2 * vector to the gradient of every touched row, once a step
  c.embedding.shard_mb = 8.0  # several devices share out tables whose vectors have so many MB; all hold smaller ones

  # Of tables that devices share out. gather: every device sees all lookups; all_to_all: each lookup goes to the device
  # that has its row; auto: all_to_all, but without fusion only from 8 devices on
  c.embedding.exchange = 'auto'

  # Kind multi_hash: a vector is made of the rows of bucket mod m and of bucket // m; no two buckets share both.
  c.embedding.multi_hash = ConfigDict()
  c.embedding.multi_hash.operation = 'mul'  # add; mul: remainder * (1 + quotient); concat: dim/2 numbers of each
  c.embedding.multi_hash.remainder_rows = 0  # m; 0: the square root of a column's buckets, which makes the fewest rows
  c.embedding.multi_hash.full_below = 200  # columns of fewer buckets, or that would save none, keep a row for each

  # Embedding variables: kinds dynamic and adaptive.
  c.embedding.rows = 1 << 20  # of the first directory, over all columns; it doubles when it is full
  c.embedding.memory_gb = 0.0  # limit of tables, slots and directories with what a save holds of them; 0: none
  c.embedding.at_limit = 'refuse'  # when they may not grow. refuse: new ids read as zero; evict: the longest unseen go
  c.embedding.admission = ConfigDict()  # who gets a row; others read as zero and are not trained
  c.embedding.admission.name = 'always'  # always; counter: exact, 16 bytes an id that waits; counting_bloom: a filter
  c.embedding.admission.threshold = 8  # occurrences, of which the last is the first that reads and trains a row
  c.embedding.admission.expected_ids = 1 << 20  # over all columns; counter: first room; counting_bloom: its size
  c.embedding.admission.error_rate = 0.01  # counting_bloom: share of ids that are admitted too early
  c.embedding.admission.bits = 8  # counting_bloom: of a counter; 8, 16 or 32
  c.embedding.eviction = ConfigDict()  # who loses a row, with its slots; an id that returns starts afresh
  c.embedding.eviction.name = 'never'  # never; global_step: by the last training step; l2: by the length of the vector
  # global_step: those not seen for more steps than this. DeepRec's number; of an epoch of 977 steps, 244 to live left a
  # third of the ids, at the same AUC within the noise of one seed (experiments/eviction.py)
  c.embedding.eviction.steps_to_live = 4000
  # l2: those with 0.5 * sum(vector^2) below this; a new one has some 0.39. In the same epoch .3 left 78 % of the ids,
  # at the same AUC within noise; DeepRec's 1.0 left 2 %, at an AUC lower by .017
  c.embedding.eviction.l2 = 0.3
  c.embedding.eviction.every = 0  # steps between evictions; 0: save_steps
  c.embedding.width = ConfigDict()  # how much of its vector an id has; the rest reads as zero
  c.embedding.width.name = 'full'  # full; dynamic: the more blocks, the oftener it was seen of late
  c.embedding.width.blocks = 4  # dynamic: equal parts of a vector
  c.embedding.width.every = 0  # dynamic: steps of a period, at whose end ids are ranked anew; 0: save_steps

  # The optimizer, of dense parameters and of table rows alike.
  c.optimizer = ConfigDict()
  c.optimizer.name = 'adamasync'  # adam, adamasync, adagraddecay, adagrad, gradientdescent
  c.optimizer.learning_rate = 0.002  # peak of the schedule
  c.optimizer.warmup_steps = 0  # linear from 0 to learning_rate
  c.optimizer.decay = 'constant'  # after the warm-up: constant, linear, cosine, exponential, polynomial (of power 2)
  c.optimizer.decay_start = 0  # step at which the decay starts; 0: after the warm-up
  c.optimizer.decay_steps = 0  # length of the decay
  c.optimizer.final_factor = 0.0  # learning rate at the end of the decay, as a share of learning_rate
  c.optimizer.weight_decay = 0.0  # decoupled: kernel -= learning rate * weight_decay * kernel; dense kernels only
  c.optimizer.b1 = 0.9  # adam, adamasync
  c.optimizer.b2 = 0.999  # adam, adamasync
  c.optimizer.eps = 1e-8  # adam, adamasync: beside sqrt(v)
  c.optimizer.rmsprop = False  # adamasync: on rows, RMSProp with momentum, without bias correction
  c.optimizer.initial_accumulator = 0.1  # adagrad, adagraddecay
  c.optimizer.accumulator_decay_steps = 100000  # adagraddecay: training steps between decays
  c.optimizer.accumulator_decay_rate = 0.9  # adagraddecay: factor of each decay
  c.optimizer.table_update = 'touched'  # touched: only rows of this batch (lazy); all: all rows, every step (slow)
  return c
