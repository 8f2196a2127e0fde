//! From logits to tokens on the host: penalties, masks and draws on the device, and the copy back on a stream of its own.

use quire_backend::{BackendError, LogitKind, SeqState};
use quire_core::{LateInputs, ModelRunnerOutput, StepId, TokenLogprobs};

use crate::Cuda;
use crate::backend::Flight;
use crate::buffers::CudaBuf;
use crate::driver::{Arena, Context, CudaError, DeviceSlice, Event, LaunchShape, Pinned};
use crate::kernels::{Kernels, logits_splits};
use crate::params::{CountTokensParams, LogitsParams, LogprobsParams, SampleParams};
use crate::slots::Recount;
use crate::staging::{RING, bytes_of_i32, bytes_of_u32};
use crate::step::{Layout, RowMeta};

/// Alternatives per token that there is room for from the start.
const TOP: usize = 20;

/// Buffers for rows of logits, made at the first step and whenever more rows come.
#[derive(Debug)]
pub(crate) struct SamplerState {
    rows: usize,
    stride: usize,
    top: usize,
    adjusted: DeviceSlice,
    best: DeviceSlice,
    masks: DeviceSlice,
    mask_rows: DeviceSlice,
    tokens: DeviceSlice,
    results: Vec<Results>,
}

/// One step's tokens on their way back. A row has its token, log-probability and rank, and `top` ids and
/// log-probabilities; each of the five is an array.
#[derive(Debug)]
struct Results {
    device: DeviceSlice,
    host: Pinned,
    computed: Event,
    arrived: Event,
}

impl SamplerState {
    pub fn empty() -> Self {
        let null = DeviceSlice::NULL;
        Self {
            rows: 0,
            stride: 0,
            top: TOP,
            adjusted: null,
            best: null,
            masks: null,
            mask_rows: null,
            tokens: null,
            results: Vec::new(),
        }
    }
}

impl Results {
    fn new(context: &std::sync::Arc<Context>, arena: &mut Arena, bytes: usize) -> Result<Self, CudaError> {
        Ok(Self {
            device: arena.alloc(bytes)?,
            host: Pinned::new(context, bytes)?,
            computed: Event::new(context)?,
            arrived: Event::new(context)?,
        })
    }
}

/// A row of the step that samples under a token mask.
struct Masks {
    /// `[masks, words]`.
    bits: Vec<u32>,
    /// `[rows]` index into `bits`, or -1.
    rows: Vec<i32>,
    words: usize,
}

impl Cuda {
    pub(crate) fn sample_rows(
        &mut self,
        logits: &CudaBuf,
        seqs: &[Option<SeqState>],
        late: &LateInputs,
    ) -> Result<(), BackendError> {
        let (num_rows, ring) = (self.current.rows.len(), self.current.ring);
        let top = self.current.rows.iter().map(|row| row.num_logprobs).max().unwrap_or(-1);
        if num_rows > logits.rows {
            return Err(self.refused(format!("{num_rows} rows of logits in a buffer of {}", logits.rows)));
        }
        self.reserve_sampler(logits, top.max(0) as usize)?;
        if num_rows > 0 {
            let masks = self.collect_masks(late, logits.cols);
            self.send_masks(&masks)?;
            self.update_slots(seqs, logits.cols)?;
            self.launch_sampler(logits, &masks, top)?;
        }
        let rows = num_rows * words_per_row(top) * 4;
        let Results { device, host, computed, arrived } = &mut self.sampler.results[ring];
        let returned = computed.record(&self.stream).and_then(|()| {
            self.copies.wait(computed)?;
            if rows > 0 {
                host.download(device.part(0, rows), &self.copies)?;
            }
            arrived.record(&self.copies)
        });
        self.check(returned)?;
        let rows = self.free_rows.pop().unwrap_or_default();
        let next = Flight { rows, ring: (ring + 1) % RING, ..Flight::default() };
        self.flights.push_back(std::mem::replace(&mut self.current, next));
        Ok(())
    }

    /// Makes room for the rows of `logits`, and `top` alternatives.
    fn reserve_sampler(&mut self, logits: &CudaBuf, top: usize) -> Result<(), BackendError> {
        let state = &self.sampler;
        let fits = logits.rows <= state.rows && logits.stride <= state.stride && top <= state.top;
        if fits && !state.results.is_empty() {
            return Ok(());
        }
        let rows = logits.rows.max(state.rows);
        let stride = logits.stride.max(state.stride);
        let top = top.max(state.top);
        self.sampler.adjusted = self.take("sampler", rows * stride * 4)?;
        self.sampler.best = self.take("sampler", rows * logits_splits(stride) * 16)?;
        self.sampler.mask_rows = self.take("sampler", rows * 4)?;
        self.sampler.masks = self.take("sampler", rows * stride.div_ceil(32) * 4)?;
        let waited = self.stream.synchronize().and_then(|()| self.copies.synchronize());
        self.check(waited)?;
        let bytes = rows * words_per_row(top as i32) * 4;
        let results = (0..RING).map(|_| Results::new(&self.context, &mut self.arena, bytes));
        let results = results.collect::<Result<_, _>>();
        self.sampler.results = self.check(results)?;
        (self.sampler.rows, self.sampler.stride, self.sampler.top) = (rows, stride, top);
        Ok(())
    }

    fn collect_masks(&self, late: &LateInputs, vocab: usize) -> Masks {
        let words = vocab.div_ceil(32);
        let rows = &self.current.rows;
        let mut masks = Masks { bits: Vec::new(), rows: Vec::new(), words };
        if late.masks.is_empty() {
            return masks;
        }
        for row in rows {
            let mask = late.masks.iter().find(|(slot, _)| *slot == row.slot && row.kind == LogitKind::Sample);
            masks.rows.push(mask.map_or(-1, |_| (masks.bits.len() / words) as i32));
            if let Some((_, mask)) = mask {
                let end = masks.bits.len() + words;
                masks.bits.extend(mask.iter().take(words));
                masks.bits.resize(end, 0);
            }
        }
        masks
    }

    fn send_masks(&mut self, masks: &Masks) -> Result<(), BackendError> {
        let (to_rows, to_bits) = (self.sampler.mask_rows, self.sampler.masks);
        let sent = self.staging.upload(bytes_of_i32(&masks.rows), to_rows, &self.stream);
        let sent = sent.and_then(|()| self.staging.upload(bytes_of_u32(&masks.bits), to_bits, &self.stream));
        self.check(sent)
    }

    /// Sends what the device does not know yet of the sequences that sample.
    fn update_slots(&mut self, seqs: &[Option<SeqState>], vocab: usize) -> Result<(), BackendError> {
        self.reserve_counts(seqs, vocab)?;
        for i in 0..self.current.rows.len() {
            let RowMeta { slot, position, kind, .. } = self.current.rows[i];
            if kind != LogitKind::Sample {
                continue;
            }
            let slot = slot.0 as usize;
            let Some(seq) = seqs.get(slot).and_then(Option::as_ref) else {
                return Err(self.refused(format!("logit row {i} names slot {slot}, which is free")));
            };
            let updated = self.slots.update(slot, seq, position, &mut self.staging, &self.stream);
            if let Some(recount) = self.check(updated)? {
                if recount.num_tokens < position as usize {
                    let known = recount.num_tokens;
                    return Err(
                        self.refused(format!("slot {slot}: {known} of {position} tokens are known to count"))
                    );
                }
                self.count_tokens(&recount, seq, vocab)?;
            }
        }
        Ok(())
    }

    /// Makes the table of counts when the first sequence with penalties comes.
    fn reserve_counts(&mut self, seqs: &[Option<SeqState>], vocab: usize) -> Result<(), BackendError> {
        let bytes = self.slots.num_slots() * vocab * 4;
        let needs_history = |row: &RowMeta| {
            let seq = seqs.get(row.slot.0 as usize).and_then(Option::as_ref);
            seq.is_some_and(|seq| seq.params.needs_history())
        };
        if self.slots.counts.bytes() < bytes && self.current.rows.iter().any(needs_history) {
            self.slots.counts = self.take("token counts", bytes)?;
            self.slots.forget_counts();
        }
        Ok(())
    }

    fn count_tokens(&mut self, recount: &Recount, seq: &SeqState, vocab: usize) -> Result<(), BackendError> {
        let row_bytes = vocab * 4;
        let tokens = &seq.tokens[..recount.num_tokens];
        let bytes = tokens.len() * 4;
        if self.sampler.tokens.bytes() < bytes {
            self.sampler.tokens = self.take("token counts", bytes.next_power_of_two().max(1 << 16))?;
        }
        let sent = self.staging.upload(bytes_of_u32(tokens), self.sampler.tokens, &self.stream);
        self.check(sent)?;
        let params = CountTokensParams {
            counts: self.slots.counts.part(recount.slot * row_bytes, row_bytes).address(),
            tokens: self.sampler.tokens.address(),
            num_tokens: tokens.len() as i32,
            num_prompt: (seq.prompt_len as usize).min(tokens.len()) as i32,
            vocab: vocab as i32,
            reserved: 0,
        };
        let launched = self.launch(&self.kernels.count_tokens, LaunchShape::linear(1, 1024), &params);
        self.check(launched)
    }

    fn launch_sampler(&mut self, logits: &CudaBuf, masks: &Masks, top: i32) -> Result<(), BackendError> {
        let (num_rows, ring) = (self.current.rows.len(), self.current.ring);
        let vocab = logits.cols;
        let has_masks = !masks.bits.is_empty();
        let (state, slots) = (&self.sampler, &self.slots);
        let mask_rows = if has_masks { state.mask_rows.address() } else { 0 };
        let process = LogitsParams {
            logits: logits.slice.address(),
            adjusted: state.adjusted.address(),
            rows: self.step_address(self.layout.logit_rows),
            num_rows: self.step_address(Layout::NUM_LOGIT_ROWS),
            slots: slots.sampling.address(),
            counts: slots.counts.address(),
            masks: state.masks.address(),
            mask_rows,
            bias_ids: slots.bias_ids.address(),
            bias_values: slots.bias_values.address(),
            stop_ids: slots.stop_ids.address(),
            best: state.best.address(),
            vocab: vocab as i32,
            stride: logits.stride as i32,
            mask_words: masks.words as i32,
            reserved: 0,
        };
        let results = ResultLayout::new(state.results[ring].device, num_rows, top);
        let sample = SampleParams {
            logits: process.logits,
            adjusted: process.adjusted,
            rows: process.rows,
            num_rows: process.num_rows,
            slots: process.slots,
            masks: process.masks,
            mask_rows,
            best: process.best,
            sampled: results.sampled,
            last_tokens: slots.last_tokens.address(),
            counts: process.counts,
            vocab: process.vocab,
            stride: process.stride,
            mask_words: process.mask_words,
            splits: logits_splits(vocab) as i32,
        };
        let mut launched = self
            .launch(&self.kernels.logits_process, Kernels::logits_process(num_rows, vocab), &process)
            .and_then(|()| self.launch(&self.kernels.sample, Kernels::sample(num_rows, vocab), &sample));
        if top >= 0 {
            let logprobs = LogprobsParams {
                logits: process.logits,
                rows: process.rows,
                num_rows: process.num_rows,
                best: process.best,
                sampled: results.sampled,
                logprob: results.logprob,
                rank: results.rank,
                top_ids: results.top_ids,
                top_logprobs: results.top_logprobs,
                max_top: top,
                vocab: process.vocab,
                stride: process.stride,
                splits: sample.splits,
            };
            let shape = LaunchShape::linear(num_rows as u32, 1024);
            launched = launched.and_then(|()| self.launch(&self.kernels.logprobs, shape, &logprobs));
        }
        self.check(launched)
    }

    pub(crate) fn fetch_rows(
        &mut self,
        step: StepId,
        out: &mut ModelRunnerOutput,
    ) -> Result<(), BackendError> {
        let Some(flight) = self.flights.pop_front() else {
            return Err(self.refused(format!("step {step} was not sampled")));
        };
        if flight.step != step {
            return Err(self.refused(format!("step {step} is asked for before step {}", flight.step)));
        }
        if let Some(results) = self.sampler.results.get(flight.ring) {
            let arrived = results.arrived.synchronize();
            self.check(arrived)?;
            // What waited for a rank that has stopped in the meantime is not worth reading.
            self.alive()?;
        }
        out.step = step;
        if !flight.rows.is_empty() {
            parse(self.sampler.results[flight.ring].host.as_slice(), &flight.rows, out);
        }
        self.free_rows.push(flight.rows);
        Ok(())
    }
}

/// Words that come back for a row, where the step reports up to `top` alternatives (-1: no log-probabilities).
fn words_per_row(top: i32) -> usize {
    if top < 0 { 1 } else { 3 + 2 * top as usize }
}

/// Addresses of the five arrays in a step's results.
struct ResultLayout {
    sampled: u64,
    logprob: u64,
    rank: u64,
    top_ids: u64,
    top_logprobs: u64,
}

impl ResultLayout {
    fn new(device: DeviceSlice, rows: usize, top: i32) -> Self {
        let at = |words: usize| device.address() + (words * 4) as u64;
        let top = top.max(0) as usize;
        Self {
            sampled: at(0),
            logprob: at(rows),
            rank: at(2 * rows),
            top_ids: at(3 * rows),
            top_logprobs: at((3 + top) * rows),
        }
    }
}

/// Appends the rows of a step to `out`.
fn parse(bytes: &[u8], rows: &[RowMeta], out: &mut ModelRunnerOutput) {
    let top = rows.iter().map(|row| row.num_logprobs).max().unwrap_or(-1).max(0) as usize;
    let words = bytes.as_chunks::<4>().0;
    let word = |at: usize| u32::from_le_bytes(words[at]);
    let n = rows.len();
    for (i, row) in rows.iter().enumerate() {
        let logprobs = (row.num_logprobs >= 0).then(|| {
            let start = i * top;
            let alternatives = (0..row.num_logprobs as usize).map(|k| {
                let (id, logprob) = (word(3 * n + start + k), word((3 + top) * n + start + k));
                (id, f32::from_bits(logprob))
            });
            TokenLogprobs {
                logprob: f32::from_bits(word(n + i)),
                rank: word(2 * n + i),
                // Past the vocabulary: -1.
                top: alternatives.take_while(|(id, _)| *id != u32::MAX).collect(),
            }
        });
        match (row.kind, logprobs) {
            (LogitKind::Sample, logprobs) => out.push_row(row.slot, &[word(i)], [logprobs]),
            (LogitKind::PromptLogprob { .. }, Some(logprobs)) => {
                out.prompt_logprobs.push((row.slot, row.position, logprobs));
            }
            (LogitKind::PromptLogprob { .. }, None) => {}
        }
    }
}
