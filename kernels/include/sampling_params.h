// Arguments of the kernels that turn logits into tokens, and the sampling state that lives on the device. Plain C: the
// Rust side mirrors it. What the kernels compute is defined by the reference backend's sampler.
//
// Order of a step: quire_logits_process, quire_sample, quire_logprobs (the last only if some row asks for it).
// R: logit rows of the step; `num_rows` points to it. Logit rows are f32, `stride` apart, a multiple of 4.
#ifndef QUIRE_SAMPLING_PARAMS_H
#define QUIRE_SAMPLING_PARAMS_H

#include <stdint.h>

/// A row of logits of this step, sent by the host.
typedef struct QuireLogitRow {
    /// Its token row (what quire_gather_rows reads: row_stride 6).
    int32_t row;
    int32_t slot;
    /// Absolute position of the token that the logits predict.
    uint32_t position;
    /// Prompt token to score, or -1: sample.
    int32_t target;
    /// Most likely tokens to report beside the chosen one; -1: no log-probabilities at all.
    int32_t num_logprobs;
    int32_t reserved;
} QuireLogitRow;

/// How a slot samples. Written by the host when a sequence takes the slot, and resident.
typedef struct QuireSlotSampling {
    uint64_t seed;
    float temperature;
    float top_p;
    float min_p;
    float presence_penalty;
    float frequency_penalty;
    float repetition_penalty;
    /// 0: off.
    uint32_t top_k;
    uint32_t prompt_len;
    uint32_t min_tokens;
    /// Row of the table of counts, or -1 for a sequence without penalties.
    int32_t counts;
    /// Ranges of the shared lists of biases and stop ids.
    int32_t bias_begin;
    int32_t bias_count;
    int32_t stop_begin;
    int32_t stop_count;
} QuireSlotSampling;

/// quire_logits_process: rows with penalties, bias, mask or a minimum length go to `adjusted`, the others stay where
/// they are; and each part's largest logit. Grid (rows, splits, 1), block QUIRE_LOGITS_THREADS.
/// Splits: QUIRE_LOGITS_SPLITS(vocab).
typedef struct QuireLogitsParams {
    /// [R, stride].
    const float* logits;
    float* adjusted;
    const QuireLogitRow* rows;
    const int32_t* num_rows;
    /// [slots].
    const QuireSlotSampling* slots;
    /// [rows, vocab]: bit 31: in the prompt; bits 0 to 30: times in the output. May be null if no slot has counts.
    const uint32_t* counts;
    /// [masks, mask_words] allowed tokens, bit id % 32 of word id / 32; ids beyond the words are not allowed.
    const uint32_t* masks;
    /// [R] row of `masks`, or -1. Null: no row has a mask.
    const int32_t* mask_rows;
    /// Ids ascend within a slot's range.
    const int32_t* bias_ids;
    const float* bias_values;
    const int32_t* stop_ids;
    /// [R, splits, 2]: the largest adjusted logit of the part, and the largest raw one, each as ordered key << 32 |
    /// ~id.
    uint64_t* best;
    int32_t vocab;
    int32_t stride;
    int32_t mask_words;
    int32_t reserved;
} QuireLogitsParams;

/// quire_sample: one block a row; QUIRE_SAMPLE_THREADS; QUIRE_SAMPLE_SMEM(vocab) bytes of dynamic shared memory.
/// Rows with a target are left alone.
typedef struct QuireSampleParams {
    const float* logits;
    const float* adjusted;
    const QuireLogitRow* rows;
    const int32_t* num_rows;
    const QuireSlotSampling* slots;
    const uint32_t* masks;
    const int32_t* mask_rows;
    const uint64_t* best;
    /// [R]: the chosen ids (or the row's target), for the host.
    int32_t* sampled;
    /// [slots]: the same, for the next step's embedding.
    int32_t* last_tokens;
    /// As above; the chosen token is counted.
    uint32_t* counts;
    int32_t vocab;
    int32_t stride;
    int32_t mask_words;
    int32_t splits;
} QuireSampleParams;

/// quire_logprobs: one block a row; QUIRE_SAMPLE_THREADS. Of the raw logits.
typedef struct QuireLogprobsParams {
    const float* logits;
    const QuireLogitRow* rows;
    const int32_t* num_rows;
    const uint64_t* best;
    /// [R], as quire_sample left them.
    const int32_t* sampled;
    /// [R] of the sampled or target token; and its rank, from 1 (0: the token is outside the row).
    float* logprob;
    int32_t* rank;
    /// [R, max_top]: the most likely tokens; past the vocabulary -1.
    int32_t* top_ids;
    float* top_logprobs;
    int32_t max_top;
    int32_t vocab;
    int32_t stride;
    int32_t splits;
} QuireLogprobsParams;

/// quire_count_tokens: counts of a sequence that takes a slot: clears its row, then counts its prompt and what it has
/// generated before. One block of QUIRE_SAMPLE_THREADS.
typedef struct QuireCountTokensParams {
    /// [vocab], the row.
    uint32_t* counts;
    /// [num_tokens], the first num_prompt of them prompt. Ids outside the vocabulary are ignored.
    const int32_t* tokens;
    int32_t num_tokens;
    int32_t num_prompt;
    int32_t vocab;
    int32_t reserved;
} QuireCountTokensParams;

// Launch shapes.
#define QUIRE_LOGITS_THREADS 256
#define QUIRE_SAMPLE_THREADS 1024
/// Ids in a part of a row.
#define QUIRE_LOGITS_PART 8192
#define QUIRE_LOGITS_SPLITS(vocab) (((vocab) + QUIRE_LOGITS_PART - 1) / QUIRE_LOGITS_PART)
/// Bytes: a sum for every 128 ids. vocab at most QUIRE_SAMPLE_MAX_VOCAB.
#define QUIRE_SAMPLE_MAX_VOCAB (1 << 18)
#define QUIRE_SAMPLE_SMEM(vocab) (((vocab) + 127) / 128 * 8)

#endif
