// Rows by index: embedding look-up into the f32 residual stream, and the gather of rows that need logits.
//
// Floors: embed reads 2 and writes 4 bytes an element (T = 8192, hidden 4096: 201 MB, 47 us at 4.3 TB/s); gather moves 4
// (R = 256: 4 MB, launch-bound). One block a row; a thread moves 16 bytes of the table at a time, a warp 512 contiguous
// bytes; eight blocks of 256 threads on a multiprocessor keep 32 KB of loads in flight, and the writes as much again.
#pragma once

#include "params.h"
#include "quire.cuh"

namespace quire {

template <typename T>
QUIRE_DEVICE void embed(const QuireEmbedParams& p) {
    griddep_launch();
    griddep_wait();
    const int row = int(blockIdx.x);
    if (row >= *p.num_rows) return;
    int id = p.token_ids[row];
    if (id < 0) id = p.last_tokens[-1 - id];
    const bool known = id >= 0 && id < p.vocab;
    const T* from = static_cast<const T*>(p.table) + int64_t(known ? id : 0) * p.hidden;
    float* to = p.out + int64_t(row) * p.hidden;
    if (!known) {
        for (int col = int(threadIdx.x); col < p.hidden; col += int(blockDim.x)) to[col] = __uint_as_float(0x7fffffffu);
    } else if (p.hidden % 8 == 0) {
        for (int col = int(threadIdx.x) * 8; col < p.hidden; col += int(blockDim.x) * 8) {
            // As words: of halves the compiler may load each by itself.
            const auto in = load<Vec<uint32_t, 4>>(from + col);
            QUIRE_UNROLL
            for (int i = 0; i < 4; i += 2) {
                const float2 lo = unpack2<T>(in.v[i]), hi = unpack2<T>(in.v[i + 1]);
                store(to + col + 2 * i, Vec<float, 4>{{p.scale * lo.x, p.scale * lo.y, p.scale * hi.x, p.scale * hi.y}});
            }
        }
    } else {
        for (int col = int(threadIdx.x); col < p.hidden; col += int(blockDim.x)) to[col] = p.scale * to_f32(from[col]);
    }
}

template <typename T>
QUIRE_DEVICE void gather_rows(const QuireGatherRowsParams& p) {
    griddep_launch();
    griddep_wait();
    const int row = int(blockIdx.x);
    if (row >= *p.num_rows) return;
    const T* from = static_cast<const T*>(p.in) + int64_t(p.rows[int64_t(row) * p.row_stride]) * p.hidden;
    T* to = static_cast<T*>(p.out) + int64_t(row) * p.hidden;
    if (p.hidden % 8 == 0) {
        for (int col = int(threadIdx.x) * 8; col < p.hidden; col += int(blockDim.x) * 8) {
            store(to + col, load<Vec<T, 8>>(from + col));
        }
    } else {
        for (int col = int(threadIdx.x); col < p.hidden; col += int(blockDim.x)) to[col] = from[col];
    }
}

}  // namespace quire
