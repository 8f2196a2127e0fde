// The test double of a CUDA driver, as seen by the doubles of cuBLASLt and NCCL and by the tests (common/mock.rs mirrors Counters).
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

extern "C" {

// Everything counted per device since mock_reset.
struct MockCounters {
    uint64_t launches;         // kernels, those replayed by graphs included
    uint64_t direct_launches;  // cuLaunchKernelEx outside a capture
    uint64_t pdl_launches;     // launches with programmatic stream serialization, captured ones counted once
    uint64_t matmuls;          // replayed ones included
    uint64_t collectives;      // of NCCL, replayed ones included
    uint64_t graph_launches;
    uint64_t graph_nodes;      // nodes replayed
    uint64_t host_to_device;   // copies, replayed ones included
    uint64_t device_to_host;
    uint64_t device_to_device;
    uint64_t memsets;
    uint64_t host_to_device_bytes;
    uint64_t synchronizations;  // of streams and events
    uint64_t work;              // what streams have done: kernels, products, copies, events, replayed ones included
    uint64_t allocations;       // ever made, device memory
    uint64_t live_allocations;  // device memory now
    uint64_t live_bytes;
    uint64_t live_pinned;
    uint64_t live_streams;
    uint64_t live_events;
    uint64_t live_modules;
    uint64_t live_graphs;  // graphs and executable graphs
};

// Puts work onto a stream, or into the graph that captures it. 0 or a CUresult. For the doubles of cuBLASLt and NCCL.
int mock_enqueue(void* stream, const std::function<int()>* work);
}
