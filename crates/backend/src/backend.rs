//! The trait itself.

use quire_core::{ExecError, HostCopy, LateInputs, ModelRunnerOutput, StepId, TensorView};

use crate::{
    AddLora, AddNorm, AllGather, AllReduce, Attention, Embed, GraphKey, KvLayout, Linear, LinearSource,
    Logits, LoraSource, Mlp, Moe, RopeAndCache, RopeTable, SeqState, StepInput,
};

/// Why a backend could not load or run.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BackendError {
    /// A tensor cannot be used as asked.
    #[error("tensor {name}: {message}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong and what is supported.
        message: String,
    },
    /// Memory for weights, buffers or cache could not be had.
    #[error("cannot allocate {bytes} bytes for {what}")]
    OutOfMemory {
        /// For what.
        what: String,
        /// How much.
        bytes: usize,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] ExecError),
}

/// What a buffer of activations holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BufRole {
    /// The residual stream, which every layer adds to: kept in f32 everywhere.
    Residual,
    /// What goes from one operation to the next: rounded where the weights are.
    Hidden,
    /// Logits: in f32 everywhere.
    Logits,
}

/// A device. Start-up methods may allocate; all others only enqueue work onto buffers made at start.
///
/// Within a step the order is: `prepare`, then the model's operations inside `run`, then `logits` (in `run` too), then
/// `sample`, then `fetch`. A backend that computes at once ([`Backend::INLINE`]) does the work inside the calls.
pub trait Backend: Sized + Send + 'static {
    /// Activations `[rows, cols]`, at least f32 precision where it matters.
    type Buf: Send;
    /// A linear layer or embedding table with its bias, packed as the backend likes.
    type Weight: Send;
    /// What the adapters add to one linear layer.
    type Lora: Send;
    /// A norm's weight vector.
    type Norm: Send;
    /// Sine and cosine tables.
    type Rope: Send;
    /// The paged cache of one KV group.
    type Kv: Send;

    /// Whether calls compute before they return. The runner then works inside `collect`, not inside `submit`.
    const INLINE: bool;

    /// For logs and errors: `cpu`, `cuda:0`.
    fn name(&self) -> String;

    /// Packs a linear layer.
    ///
    /// # Errors
    /// Unsupported type or shape, or out of memory.
    fn load_linear(&mut self, source: &LinearSource<'_>) -> Result<Self::Weight, BackendError>;

    /// Packs what the adapters add to one linear layer. Adapters are loaded at start, so that they lie at fixed addresses.
    ///
    /// # Errors
    /// Parts that do not fit the layer, an unsupported type, or out of memory.
    fn load_lora(&mut self, source: &LoraSource<'_>) -> Result<Self::Lora, BackendError>;

    /// Loads a norm's weight `[n]`.
    ///
    /// # Errors
    /// As `load_linear`.
    fn load_norm(&mut self, name: &str, weight: TensorView<'_>) -> Result<Self::Norm, BackendError>;

    /// Computes the tables of a rotary embedding.
    ///
    /// # Errors
    /// Out of memory.
    fn load_rope(&mut self, table: &RopeTable) -> Result<Self::Rope, BackendError>;

    /// Allocates activations. `role` says what they are for, so that a backend can choose how to store them.
    ///
    /// # Errors
    /// Out of memory.
    fn alloc(&mut self, role: BufRole, rows: usize, cols: usize) -> Result<Self::Buf, BackendError>;

    /// Allocates the cache of one KV group.
    ///
    /// # Errors
    /// Unsupported type, or out of memory.
    fn alloc_kv(&mut self, layout: &KvLayout) -> Result<Self::Kv, BackendError>;

    /// Puts blocks in host memory behind a cache; `layout` is the cache's own, with the number of those blocks. On a GPU
    /// they are pinned, so that copies run beside the computation.
    ///
    /// # Errors
    /// Out of memory, or this backend has no host tier (the default).
    fn alloc_host_kv(&mut self, kv: &mut Self::Kv, layout: &KvLayout) -> Result<(), BackendError> {
        let _ = (kv, layout);
        Err(no_host_tier(self.name()))
    }

    /// Takes the step's metadata: uploads it and splits the attention work.
    ///
    /// # Errors
    /// The device failed.
    fn prepare(&mut self, input: &StepInput<'_>) -> Result<(), BackendError>;

    /// Runs `body`. With a key, a backend may record the launches of `body` once and replay them afterwards, so `body`
    /// must depend on the key and on buffer addresses only.
    ///
    /// # Errors
    /// Those of `body`, or the device failed.
    fn run(
        &mut self,
        key: Option<GraphKey>,
        body: impl FnMut(&mut Self) -> Result<(), BackendError>,
    ) -> Result<(), BackendError>;

    /// Numbers of rows for which this backend records steps with a key, largest first: steps of these sizes, run twice at
    /// start, leave nothing to be recorded while requests wait. Up to `max_rows`; none by default.
    fn recorded_rows(&self, max_rows: usize) -> Vec<usize> {
        let _ = max_rows;
        Vec::new()
    }

    /// Copies whole blocks of all layers: the step's `block_copies`, in order.
    ///
    /// # Errors
    /// The device failed; so for all operations below.
    fn copy_blocks(&mut self, kv: &mut Self::Kv) -> Result<(), BackendError>;

    /// Copies whole blocks of all layers between the device and the blocks of [`Self::alloc_host_kv`]: `to_host` first,
    /// which reads what the steps before have left, then `to_device`, which may read what was copied out just now. Within
    /// a list the order does not matter. Called after `prepare`, before `copy_blocks`, and not at all if both are empty.
    ///
    /// # Errors
    /// The device failed, or this backend has no host tier (the default).
    fn copy_host_blocks(
        &mut self,
        kv: &mut Self::Kv,
        to_host: &[HostCopy],
        to_device: &[HostCopy],
    ) -> Result<(), BackendError> {
        let _ = (kv, to_host, to_device);
        Err(no_host_tier(self.name()))
    }

    /// See [`Embed`].
    fn embed(&mut self, op: Embed<'_, Self>) -> Result<(), BackendError>;

    /// See [`AddNorm`].
    fn add_norm(&mut self, op: AddNorm<'_, Self>) -> Result<(), BackendError>;

    /// See [`Linear`].
    fn linear(&mut self, op: Linear<'_, Self>) -> Result<(), BackendError>;

    /// See [`AddLora`]. Called only in steps in which a row has an adapter.
    fn add_lora(&mut self, op: AddLora<'_, Self>) -> Result<(), BackendError>;

    /// See [`RopeAndCache`].
    fn rope_and_cache(&mut self, op: RopeAndCache<'_, Self>) -> Result<(), BackendError>;

    /// See [`Attention`].
    fn attention(&mut self, op: Attention<'_, Self>) -> Result<(), BackendError>;

    /// See [`Mlp`].
    fn mlp(&mut self, op: Mlp<'_, Self>) -> Result<(), BackendError>;

    /// See [`Moe`].
    fn moe(&mut self, op: Moe<'_, Self>) -> Result<(), BackendError>;

    /// See [`Logits`].
    fn logits(&mut self, op: Logits<'_, Self>) -> Result<(), BackendError>;

    /// See [`AllReduce`].
    fn all_reduce(&mut self, op: AllReduce<'_, Self>) -> Result<(), BackendError>;

    /// See [`AllGather`].
    fn all_gather(&mut self, op: AllGather<'_, Self>) -> Result<(), BackendError>;

    /// Chooses a token for every `Sample` row and computes the log-probabilities asked for. `seqs` is the runner's
    /// per-slot state as in `StepInput`.
    ///
    /// # Errors
    /// The device failed.
    fn sample(
        &mut self,
        logits: &mut Self::Buf,
        seqs: &[Option<SeqState>],
        late: &LateInputs,
    ) -> Result<(), BackendError>;

    /// Waits for the step and appends its rows (in the order of `logit_rows`) to `out`.
    ///
    /// # Errors
    /// The device failed.
    fn fetch(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), BackendError>;

    /// Reads activations back, for tests: the first `rows` rows, row-major.
    ///
    /// # Errors
    /// The device failed.
    fn read(&mut self, buf: &Self::Buf, rows: usize) -> Result<Vec<f32>, BackendError>;

    /// Writes activations from the host, for tests: whole rows from the first on.
    ///
    /// # Errors
    /// The device failed.
    fn write(&mut self, buf: &mut Self::Buf, values: &[f32]) -> Result<(), BackendError>;
}

fn no_host_tier(device: String) -> BackendError {
    let message = "keys and values in host memory are not supported on this device".to_owned();
    BackendError::Device(ExecError { device, message })
}
