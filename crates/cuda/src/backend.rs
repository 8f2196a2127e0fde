//! The backend itself: what it owns, how a step begins, and how steps are recorded and replayed.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use quire_backend::{
    AddLora, AddNorm, AllGather, AllReduce, Attention, Backend, BackendError, BufRole, Embed, GraphKey,
    KvLayout, Linear, LinearSource, Logits, LoraSource, Mlp, Moe, RopeAndCache, RopeTable, SeqState,
    StepInput,
};
use quire_core::{ExecError, LateInputs, ModelRunnerOutput, StepId, TensorView};

use crate::attention::AttentionState;
use crate::blaslt::{BlasLt, Selection};
use crate::buffers::{CudaBuf, CudaKv, CudaNorm, CudaRope, CudaWeight, decode, encode};
use crate::driver::presence::probe_cublaslt;
use crate::driver::{
    Arena, Context, CudaError, DeviceSlice, Graph, LaunchShape, Modules, Pinned, Stream, Unavailable,
};
use crate::kernels::{DECODE_ROWS, Kernels};
use crate::lora::{CudaLora, LoraStep};
use crate::memory_use::Ledger;
use crate::moe::Routing;
use crate::nccl::Communicator;
use crate::options::{CudaOptions, KernelSet};
use crate::params::{StepPlanParams, UpdateTablesParams};
use crate::quantized::QuantizedRows;
use crate::sampling::SamplerState;
use crate::slots::Slots;
use crate::staging::{RING, Staging, bytes_of_i32};
use crate::step::{Layout, MAX_COPIES, MAX_ENTRIES, RowMeta, bucket, copy_rounds, pack};

/// Pinned bytes for one step's uploads; also the pieces in which weights travel.
const STAGING_BYTES: usize = 4 << 20;
/// Steps of up to so many rows are recorded at start: see [`bucket`].
const MAX_RECORDED_ROWS: usize = 1024;
/// Threads of a block of `quire_step_plan` and `quire_update_tables`.
const PLAN_THREADS: u32 = 256;

/// A GPU with our kernels and cuBLASLt.
///
/// Fields are dropped in order: what runs or holds addresses goes before what it points to.
#[derive(Debug)]
pub struct Cuda {
    pub(crate) graphs: Graphs,
    /// `None`: the only GPU. NCCL wants graphs dropped before it.
    pub(crate) communicator: Option<Communicator>,
    pub(crate) kernels: Kernels,
    pub(crate) blas: BlasLt,
    pub(crate) sampler: SamplerState,
    pub(crate) staging: Staging,
    pub(crate) stream: Stream,
    /// Tokens come back on it, beside the next step.
    pub(crate) copies: Stream,
    pub(crate) arena: Arena,
    pub(crate) ledger: Ledger,
    _modules: Modules,
    pub(crate) context: Arc<Context>,
    pub(crate) options: CudaOptions,

    pub(crate) slots: Slots,
    pub(crate) attention: AttentionState,
    /// Rows of the largest buffer of activations: no step may have more.
    pub(crate) max_rows: usize,
    pub(crate) page_tokens: usize,
    /// The step's upload, and what `quire_step_plan` makes of it.
    upload: DeviceSlice,
    pub(crate) positions: DeviceSlice,
    pub(crate) slot_mapping: DeviceSlice,
    planned_rows: DeviceSlice,
    pub(crate) mlp_hidden: DeviceSlice,
    pub(crate) gathered: DeviceSlice,
    pub(crate) quantized_rows: QuantizedRows,
    /// Logits of all ranks, one rank after the other.
    pub(crate) logit_parts: DeviceSlice,
    pub(crate) routing: Routing,
    pub(crate) lora: LoraStep,

    pub(crate) layout: Layout,
    /// Rows that are launched: the step's, or those of its bucket.
    pub(crate) rows: usize,
    pub(crate) logit_launch_rows: usize,
    /// Tokens of the sequence with the fewest in the step, and of that with the most.
    pub(crate) query_lengths: (usize, usize),
    pub(crate) copy_rounds: Vec<Vec<[i32; 2]>>,
    /// The step's copies did not go with its upload.
    pub(crate) has_extra_copies: bool,
    /// Prepared and not sampled.
    pub(crate) current: Flight,
    /// Sampled and not fetched.
    pub(crate) flights: VecDeque<Flight>,
    /// Buffers of fetched steps.
    pub(crate) free_rows: Vec<Vec<RowMeta>>,
    words: Vec<i32>,
    entries: Vec<i32>,
    /// Why nothing can be done any more.
    poison: Option<ExecError>,
}

/// A step between `prepare` and `fetch`.
#[derive(Debug, Default)]
pub(crate) struct Flight {
    pub step: StepId,
    pub rows: Vec<RowMeta>,
    /// Which of the result buffers is its own.
    pub ring: usize,
}

/// What, beside the caller's key, decides which kernels a step launches and on how many rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Signature {
    key: GraphKey,
    rows: usize,
    logit_rows: usize,
    /// Those of the step, up to what decides between decode and prefill attention.
    query_lengths: (usize, usize),
}

/// Recorded steps. A signature is run once, which makes what is made at the first use, then recorded, then replayed.
#[derive(Debug, Default)]
pub(crate) struct Graphs {
    recorded: HashMap<Signature, Option<Graph>>,
}

impl Graphs {
    /// Addresses may change: everything is recorded anew.
    pub fn clear(&mut self) {
        self.recorded.clear();
    }
}

impl Cuda {
    /// Takes the GPU and loads the kernels. `images` are fatbins with their names.
    ///
    /// # Errors
    /// Why this GPU cannot be used; never panics without a driver.
    pub fn new(images: &[(&str, &[u8])], options: CudaOptions) -> Result<Self, Unavailable> {
        let context = Self::context_for(images, options.ordinal)?;
        Self::open(images, options, context, None).map_err(|error| Unavailable::Failed(error.to_string()))
    }

    /// Takes several GPUs as the ranks of one group, by rank; `options.ordinal` does not count.
    ///
    /// # Errors
    /// As for [`Self::new`], or there is no NCCL for more than one.
    pub fn group(
        images: &[(&str, &[u8])],
        options: &CudaOptions,
        ordinals: &[u32],
    ) -> Result<Vec<Self>, Unavailable> {
        let context = |&ordinal: &u32| Self::context_for(images, ordinal);
        let contexts = ordinals.iter().map(context).collect::<Result<Vec<_>, _>>()?;
        let mut communicators = match &contexts[..] {
            [] | [_] => Vec::new(),
            several => Communicator::group(several)?,
        }
        .into_iter();
        let open = |context: Arc<Context>| {
            let options = CudaOptions { ordinal: context.ordinal(), ..options.clone() };
            let opened = Self::open(images, options, context, communicators.next());
            opened.map_err(|error| Unavailable::Failed(error.to_string()))
        };
        contexts.into_iter().map(open).collect()
    }

    /// A GPU, once everything else is known to be there.
    fn context_for(images: &[(&str, &[u8])], ordinal: u32) -> Result<Arc<Context>, Unavailable> {
        if images.is_empty() {
            return Err(Unavailable::NoKernels);
        }
        let context = Context::new(ordinal)?;
        probe_cublaslt()?;
        Ok(context)
    }

    fn open(
        images: &[(&str, &[u8])],
        options: CudaOptions,
        context: Arc<Context>,
        communicator: Option<Communicator>,
    ) -> Result<Self, CudaError> {
        let modules = Modules::load(&context, images)?;
        let use_sm90a = options.kernels == KernelSet::Sm90a && context.compute_capability() == (9, 0);
        let kernels = Kernels::find(&modules, options.activations, use_sm90a)?;
        let mut arena = Arena::new(context.clone(), options.arena_chunk);
        let selection = match options.batch_invariant {
            true => Selection::Invariant,
            false => Selection::Timed { cache: options.algorithm_cache.clone() },
        };
        let blas = BlasLt::new(&context, &mut arena, selection)?;
        let slots = Slots::new(&mut arena, 1, 1)?;
        let null = DeviceSlice::NULL;
        Ok(Self {
            graphs: Graphs::default(),
            communicator,
            kernels,
            blas,
            sampler: SamplerState::empty(),
            staging: Staging::new(&context, STAGING_BYTES)?,
            stream: Stream::new(&context)?,
            copies: Stream::new(&context)?,
            arena,
            ledger: Ledger::default(),
            _modules: modules,
            context,
            options,
            slots,
            attention: AttentionState::default(),
            max_rows: 0,
            page_tokens: 0,
            upload: null,
            positions: null,
            slot_mapping: null,
            planned_rows: null,
            mlp_hidden: null,
            gathered: null,
            quantized_rows: QuantizedRows::default(),
            logit_parts: null,
            routing: Routing::empty(),
            lora: LoraStep::empty(),
            layout: Layout::new(0, 0),
            rows: 0,
            logit_launch_rows: 0,
            query_lengths: (0, 0),
            copy_rounds: Vec::new(),
            has_extra_copies: false,
            current: Flight::default(),
            flights: VecDeque::with_capacity(RING),
            free_rows: Vec::with_capacity(RING),
            words: Vec::new(),
            entries: Vec::new(),
            poison: None,
        })
    }

    /// The GPU.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Bytes of device memory taken so far.
    pub fn allocated_bytes(&self) -> u64 {
        self.arena.bytes()
    }

    /// An error of the caller: nothing happened on the device.
    pub(crate) fn refused(&self, message: String) -> BackendError {
        BackendError::Device(ExecError { device: self.name(), message })
    }

    /// Passes results on; an error of the device is kept, and every later call fails with it.
    pub(crate) fn check<T>(&mut self, outcome: Result<T, CudaError>) -> Result<T, BackendError> {
        outcome.map_err(|error| {
            let error = ExecError { device: self.name(), message: error.to_string() };
            BackendError::Device(self.poison.get_or_insert(error).clone())
        })
    }

    /// Whether the device has not failed, nor one that it works with.
    pub(crate) fn alive(&self) -> Result<(), BackendError> {
        match &self.poison {
            Some(error) => Err(BackendError::Device(error.clone())),
            None if self.communicator.as_ref().is_some_and(Communicator::is_broken) => {
                Err(self.refused("another tensor-parallel rank has stopped".into()))
            }
            None => Ok(()),
        }
    }

    /// Where a word of the step's upload lies.
    pub(crate) fn step_address(&self, word: usize) -> u64 {
        self.upload.address() + (word * 4) as u64
    }

    /// `words` words of it.
    pub(crate) fn step_slice(&self, word: usize, words: usize) -> DeviceSlice {
        self.upload.part(word * 4, words * 4)
    }

    /// Makes room for a step of this size: at the first one, and where a caller outgrows what it said at start.
    fn reserve(&mut self, input: &StepInput<'_>) -> Result<(), BackendError> {
        let (num_slots, stride) = (input.seqs.len(), input.max_blocks_per_seq as usize);
        self.max_rows = self.max_rows.max(input.num_tokens());
        if !self.slots.holds(num_slots, stride) {
            let num_slots = num_slots.max(self.slots.num_slots());
            let stride = stride.max(self.slots.table_stride);
            self.graphs.clear();
            self.attention.forget();
            let slots = Slots::new(&mut self.arena, num_slots, stride);
            self.slots = self.check(slots)?;
        }
        let rows = self.max_rows.max(bucket(input.num_tokens()));
        let words = Layout::new(rows, rows.max(bucket(input.logit_rows.len()))).words();
        if self.upload.bytes() < words * 4 {
            self.attention.forget();
            self.upload = self.take("step", words * 4)?;
            self.positions = self.take("step", rows * 4)?;
            self.slot_mapping = self.take("step", rows * 4)?;
            self.planned_rows = self.take("step", 4)?;
        }
        Ok(())
    }

    /// Checks what the kernels cannot: addresses they compute from it must exist.
    fn check_step(&self, input: &StepInput<'_>) -> Result<(), BackendError> {
        let (tokens, seqs) = (input.num_tokens(), input.num_seqs());
        let refuse = |what: String| Err(self.refused(format!("step {}: {what}", input.step)));
        let is_whole = input.cu_seqlens_q.len() == seqs + 1
            && input.cu_seqlens_q.is_sorted()
            && input.cu_seqlens_q.last().is_some_and(|&last| last as usize == tokens)
            && input.seq_lens.len() == seqs
            && input.block_tables.len() >= seqs * input.max_blocks_per_seq as usize
            && seqs <= tokens;
        if !is_whole {
            return refuse(format!("its arrays disagree about {tokens} tokens of {seqs} sequences"));
        }
        if let Some(slot) = input.seq_slots.iter().find(|slot| slot.0 as usize >= input.seqs.len()) {
            return refuse(format!("slot {slot} of {}", input.seqs.len()));
        }
        let logit_rows = input.logit_rows.iter();
        let outside = |row: &&quire_backend::LogitRow| {
            row.row as usize >= tokens || row.slot.0 as usize >= input.seqs.len()
        };
        if let Some(row) = logit_rows.clone().find(outside) {
            return refuse(format!("logit row {row:?} of {tokens} tokens and {} slots", input.seqs.len()));
        }
        if self.flights.len() >= RING {
            return refuse(format!("{} steps are in flight", self.flights.len()));
        }
        Ok(())
    }

    fn begin_step(&mut self, input: &StepInput<'_>) -> Result<(), BackendError> {
        self.check_step(input)?;
        self.reserve(input)?;
        let turned = self.staging.next(&self.stream);
        self.check(turned)?;

        let (tokens, logit_rows) = (input.num_tokens(), input.logit_rows.len());
        self.rows = tokens;
        self.logit_launch_rows = logit_rows;
        self.layout = Layout::new(bucket(tokens), bucket(logit_rows));
        let lengths = input.cu_seqlens_q.windows(2).map(|w| (w[1] - w[0]) as usize);
        self.query_lengths = (lengths.clone().min().unwrap_or(0), lengths.max().unwrap_or(0));

        self.current.step = input.step;
        pack(input, &self.layout, &mut self.words, &mut self.current.rows);
        self.pack_copies(input);
        self.entries.clear();
        if self.page_tokens > 0 {
            self.slots.table_changes(input, self.page_tokens, &mut self.entries);
        }
        self.send_step()?;
        self.send_adapters(input)
    }

    fn pack_copies(&mut self, input: &StepInput<'_>) {
        self.copy_rounds = copy_rounds(input.block_copies);
        self.has_extra_copies = match &self.copy_rounds[..] {
            [] => false,
            [one] => one.len() > MAX_COPIES,
            _ => true,
        };
        if let ([round], false) = (&self.copy_rounds[..], self.has_extra_copies) {
            self.words[Layout::NUM_PAIRS] = round.len() as i32;
            for (pair, to) in round.iter().zip(self.words[self.layout.pairs..].chunks_exact_mut(2)) {
                to.copy_from_slice(pair);
            }
        }
    }

    /// Uploads the step with its first changes of block tables, then what is left of these.
    fn send_step(&mut self) -> Result<(), BackendError> {
        let entries = std::mem::take(&mut self.entries);
        let (first, rest) = entries.split_at(entries.len().min(3 * MAX_ENTRIES));
        self.words[Layout::NUM_ENTRIES] = (first.len() / 3) as i32;
        self.words.extend_from_slice(first);
        let sent = self.staging.upload(bytes_of_i32(&self.words), self.upload, &self.stream);
        self.check(sent)?;
        if !first.is_empty() {
            self.update_tables(first.len() / 3)?;
        }
        for piece in rest.chunks(3 * MAX_ENTRIES) {
            let count = self.step_slice(Layout::NUM_ENTRIES, 1);
            let words = self.step_slice(self.layout.entries, piece.len());
            let sent = self
                .staging
                .upload(bytes_of_i32(&[(piece.len() / 3) as i32]), count, &self.stream)
                .and_then(|()| self.staging.upload(bytes_of_i32(piece), words, &self.stream));
            self.check(sent)?;
            self.update_tables(piece.len() / 3)?;
        }
        self.entries = entries;
        Ok(())
    }

    fn update_tables(&mut self, count: usize) -> Result<(), BackendError> {
        let params = UpdateTablesParams {
            entries: self.step_address(self.layout.entries),
            num_entries: self.step_address(Layout::NUM_ENTRIES),
            block_tables: self.slots.block_tables.address(),
            table_stride: self.slots.table_stride as i32,
            reserved: 0,
        };
        let shape = LaunchShape::linear((count as u32).div_ceil(PLAN_THREADS), PLAN_THREADS);
        let launched = self.launch(&self.kernels.update_tables, shape, &params);
        self.check(launched)
    }

    /// Positions and places in the cache of the step's rows, from its sequences.
    fn plan_rows(&mut self) -> Result<(), BackendError> {
        self.attention.begin();
        if self.page_tokens == 0 {
            return Ok(());
        }
        let params = StepPlanParams {
            cu_seqlens_q: self.step_address(self.layout.cu_seqlens_q),
            seq_lens: self.step_address(self.layout.seq_lens),
            seq_slots: self.step_address(self.layout.seq_slots),
            num_seqs: self.step_address(Layout::NUM_SEQS),
            block_tables: self.slots.block_tables.address(),
            positions: self.positions.address(),
            slot_mapping: self.slot_mapping.address(),
            num_rows: self.planned_rows.address(),
            table_stride: self.slots.table_stride as i32,
            page_tokens: self.page_tokens as i32,
            bucket: self.rows as i32,
            reserved: 0,
        };
        let shape = LaunchShape::linear((self.rows as u32).div_ceil(PLAN_THREADS), PLAN_THREADS);
        let launched = self.launch(&self.kernels.step_plan, shape, &params);
        self.check(launched)
    }

    fn eager(
        &mut self,
        body: &mut impl FnMut(&mut Self) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        self.plan_rows()?;
        body(self)
    }

    /// Runs, records or replays `body`.
    fn run_keyed(
        &mut self,
        key: GraphKey,
        body: &mut impl FnMut(&mut Self) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        self.rows = bucket(self.rows).min(self.max_rows);
        self.logit_launch_rows = bucket(self.logit_launch_rows).min(self.max_rows);
        let logit_rows = if self.current.rows.is_empty() { 0 } else { self.logit_launch_rows };
        let (shortest, longest) = self.query_lengths;
        let query_lengths = (shortest.min(DECODE_ROWS + 1), longest.min(DECODE_ROWS + 1));
        let signature = Signature { key, rows: self.rows, logit_rows, query_lengths };
        match self.graphs.recorded.get(&signature) {
            Some(Some(graph)) => {
                let launched = graph.launch(&self.stream);
                return self.check(launched);
            }
            Some(None) => {}
            None => {
                self.eager(body)?;
                // What was made at this first use forgot all graphs; none of them was this one.
                self.graphs.recorded.insert(signature, None);
                return Ok(());
            }
        }
        let graph = self.record(body)?;
        let launched = graph.launch(&self.stream);
        self.graphs.recorded.insert(signature, Some(graph));
        self.check(launched)
    }

    fn record(
        &mut self,
        body: &mut impl FnMut(&mut Self) -> Result<(), BackendError>,
    ) -> Result<Graph, BackendError> {
        let capture = self.stream.begin_capture();
        let capture = self.check(capture)?;
        let enqueued = self.eager(body);
        let ended = capture.end(&self.stream);
        enqueued?;
        self.check(ended)
    }
}

impl Drop for Cuda {
    /// What is enqueued reads and writes memory that goes next. It may wait for a rank that will never come, so this one
    /// leaves its group first.
    fn drop(&mut self) {
        self.graphs.clear();
        self.communicator = None;
        let _ = self.stream.synchronize();
        let _ = self.copies.synchronize();
    }
}

impl Backend for Cuda {
    type Buf = CudaBuf;
    type Weight = CudaWeight;
    type Lora = CudaLora;
    type Norm = CudaNorm;
    type Rope = CudaRope;
    type Kv = CudaKv;

    const INLINE: bool = false;

    fn name(&self) -> String {
        format!("cuda:{}", self.options.ordinal)
    }

    fn load_linear(&mut self, source: &LinearSource<'_>) -> Result<CudaWeight, BackendError> {
        self.linear_from(source)
    }

    fn load_lora(&mut self, source: &LoraSource<'_>) -> Result<CudaLora, BackendError> {
        self.lora_from(source)
    }

    fn load_norm(&mut self, name: &str, weight: TensorView<'_>) -> Result<CudaNorm, BackendError> {
        self.norm_from(name, &weight)
    }

    fn load_rope(&mut self, table: &RopeTable) -> Result<CudaRope, BackendError> {
        self.rope_from(table)
    }

    fn alloc(&mut self, role: BufRole, rows: usize, cols: usize) -> Result<CudaBuf, BackendError> {
        self.buffer(role, rows, cols)
    }

    fn alloc_kv(&mut self, layout: &KvLayout) -> Result<CudaKv, BackendError> {
        self.kv_from(layout)
    }

    fn prepare(&mut self, input: &StepInput<'_>) -> Result<(), BackendError> {
        self.alive()?;
        self.begin_step(input)
    }

    fn run(
        &mut self,
        key: Option<GraphKey>,
        mut body: impl FnMut(&mut Self) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        self.alive()?;
        match key {
            Some(key) if self.options.graphs && !self.has_extra_copies => self.run_keyed(key, &mut body),
            _ => self.eager(&mut body),
        }
    }

    fn recorded_rows(&self, max_rows: usize) -> Vec<usize> {
        let mut rows: Vec<_> =
            (1..=max_rows.min(MAX_RECORDED_ROWS)).map(|rows| bucket(rows).min(max_rows)).collect();
        rows.dedup();
        rows.reverse();
        if self.options.graphs { rows } else { Vec::new() }
    }

    fn copy_blocks(&mut self, kv: &mut CudaKv) -> Result<(), BackendError> {
        self.alive()?;
        self.copy_pages(kv)
    }

    fn embed(&mut self, op: Embed<'_, Self>) -> Result<(), BackendError> {
        self.alive()?;
        self.embed_rows(&op)
    }

    fn add_norm(&mut self, op: AddNorm<'_, Self>) -> Result<(), BackendError> {
        self.alive()?;
        self.add_and_norm(&op)
    }

    fn linear(&mut self, op: Linear<'_, Self>) -> Result<(), BackendError> {
        self.alive()?;
        self.linear_rows(&op)
    }

    fn add_lora(&mut self, op: AddLora<'_, Self>) -> Result<(), BackendError> {
        self.alive()?;
        self.add_lora_rows(&op)
    }

    fn rope_and_cache(&mut self, op: RopeAndCache<'_, Self>) -> Result<(), BackendError> {
        self.alive()?;
        self.rope_rows(&op)
    }

    fn attention(&mut self, op: Attention<'_, Self>) -> Result<(), BackendError> {
        self.alive()?;
        self.attend(&op)
    }

    fn mlp(&mut self, op: Mlp<'_, Self>) -> Result<(), BackendError> {
        self.alive()?;
        self.mlp_rows(&op)
    }

    fn moe(&mut self, op: Moe<'_, Self>) -> Result<(), BackendError> {
        self.alive()?;
        self.moe_rows(&op)
    }

    fn logits(&mut self, op: Logits<'_, Self>) -> Result<(), BackendError> {
        self.alive()?;
        self.logit_rows(&op)
    }

    fn all_reduce(&mut self, op: AllReduce<'_, Self>) -> Result<(), BackendError> {
        self.alive()?;
        self.sum_rows(&op)
    }

    fn all_gather(&mut self, op: AllGather<'_, Self>) -> Result<(), BackendError> {
        self.alive()?;
        self.gather_logits(&op)
    }

    fn sample(
        &mut self,
        logits: &mut CudaBuf,
        seqs: &[Option<SeqState>],
        late: &LateInputs,
    ) -> Result<(), BackendError> {
        self.alive()?;
        self.sample_rows(logits, seqs, late)
    }

    fn fetch(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), BackendError> {
        self.alive()?;
        self.fetch_rows(step, out)
    }

    fn read(&mut self, buf: &CudaBuf, rows: usize) -> Result<Vec<f32>, BackendError> {
        self.alive()?;
        if rows > buf.rows {
            return Err(self.refused(format!("{rows} rows of a buffer of {}", buf.rows)));
        }
        let from = buf.slice.part(0, rows * buf.stride * buf.element.size());
        let copied = Pinned::new(&self.context, from.bytes()).and_then(|mut host| {
            host.download(from, &self.stream)?;
            self.stream.synchronize()?;
            Ok(decode(&host.as_slice()[..from.bytes()], buf.element))
        });
        let values = self.check(copied)?;
        Ok(values.chunks(buf.stride.max(1)).flat_map(|row| &row[..buf.cols]).copied().collect())
    }

    fn write(&mut self, buf: &mut CudaBuf, values: &[f32]) -> Result<(), BackendError> {
        self.alive()?;
        let rows = values.len() / buf.cols.max(1);
        if rows > buf.rows || rows * buf.cols != values.len() {
            return Err(self.refused(format!("{} values for [{}, {}]", values.len(), buf.rows, buf.cols)));
        }
        let mut bytes = Vec::new();
        for row in values.chunks(buf.cols.max(1)) {
            let padding = std::iter::repeat_n(0.0, buf.stride - buf.cols);
            encode(row.iter().copied().chain(padding), buf.element, &mut bytes);
        }
        self.send(&bytes, buf.slice)
    }
}
