// From logits to tokens: see include/logits.cuh, sample.cuh and logprobs.cuh.
#include "logits.cuh"
#include "logprobs.cuh"
#include "sample.cuh"

QUIRE_KERNEL_BOUNDS(quire_logits_process, QuireLogitsParams, 256, 6) { quire::logits_process(p); }
QUIRE_KERNEL_BOUNDS(quire_sample, QuireSampleParams, 1024, 1) { quire::sample(p); }
QUIRE_KERNEL_BOUNDS(quire_logprobs, QuireLogprobsParams, 1024, 1) { quire::logprobs(p); }
QUIRE_KERNEL_BOUNDS(quire_count_tokens, QuireCountTokensParams, 1024, 1) { quire::count_tokens(p); }
