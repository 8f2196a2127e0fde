// Copies of whole KV pages through every layer: forks and copies on write inside the pool, swaps to and from host memory.
//
// Floor: each byte read and written once. A block moves 16 KB at a time: four 16-byte loads in flight from each thread,
// 64 KB on a multiprocessor with four blocks; the grid strides, so any launch covers any list.
#pragma once

#include "params.h"
#include "quire.cuh"

namespace quire {

template <typename Word>
QUIRE_DEVICE void copy_page_part(const char* from, char* to, uint64_t bytes) {
    constexpr int kWords = 4;
    constexpr uint64_t kStep = QUIRE_COPY_THREADS * sizeof(Word);
    for (uint64_t at = threadIdx.x * sizeof(Word); at < bytes; at += kWords * kStep) {
        Word words[kWords];
        QUIRE_UNROLL
        for (int i = 0; i < kWords; ++i) {
            if (at + i * kStep < bytes) words[i] = *reinterpret_cast<const Word*>(from + at + i * kStep);
        }
        QUIRE_UNROLL
        for (int i = 0; i < kWords; ++i) {
            if (at + i * kStep < bytes) *reinterpret_cast<Word*>(to + at + i * kStep) = words[i];
        }
    }
}

QUIRE_DEVICE void copy_pages(const QuireCopyPagesParams& p) {
    constexpr uint64_t kPart = 16384;
    griddep_launch();
    griddep_wait();
    const uint64_t parts = (p.page_bytes + kPart - 1) / kPart;
    const uint64_t units = parts * uint64_t(p.num_layers) * uint64_t(*p.num_pairs);
    for (uint64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const uint64_t start = unit % parts * kPart, page = unit / parts;
        const uint64_t layer = page % uint64_t(p.num_layers), pair = page / uint64_t(p.num_layers);
        const int32_t src = p.pairs[2 * pair], dst = p.pairs[2 * pair + 1];
        const uint64_t bytes = min((unsigned long long)kPart, (unsigned long long)(p.page_bytes - start));
        const char* from =
            static_cast<const char*>(p.src) + layer * p.src_layer_stride + uint64_t(src) * p.page_bytes + start;
        char* to = static_cast<char*>(p.dst) + layer * p.dst_layer_stride + uint64_t(dst) * p.page_bytes + start;
        if (((p.page_bytes | p.src_layer_stride | p.dst_layer_stride) & 15) == 0) {
            copy_page_part<uint4>(from, to, bytes);
        } else {
            copy_page_part<uint32_t>(from, to, bytes);
        }
    }
}

}  // namespace quire
