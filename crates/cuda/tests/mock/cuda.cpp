// A CUDA driver without a device, for tests: the entry points that the backend uses, with memory of the host.
//
// It runs kernels that were built for the host (mock_kernels), keeps streams in order, and is strict where a real driver
// only sometimes fails: device memory begins and ends at guard pages and starts as NaN, asynchronous copies demand
// pinned memory, work on a stream is put off until something waits for it (mock_delay), captured launches keep the
// arguments they had, and an error stays, whether it comes in a call (mock_fail) or in the work (mock_fail_in_work).
//
// A whole process can be run under it too: as libcuda.so.1 in LD_LIBRARY_PATH, told what tests otherwise say by calls:
//   QUIRE_MOCK_KERNELS   the host build of the kernels; any image then holds all of them
//   QUIRE_MOCK_FAIL      a path: once a file is there, the device has failed (an illegal address); how many copies to
//                        the host it had begun by then is appended to the file
#include "mock.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

enum Result {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_CONTEXT = 201,
    INVALID_IMAGE = 200,
    INVALID_DEVICE = 101,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
};

constexpr int DEVICES = 256;
constexpr size_t GUARD = 4096;
constexpr size_t TOTAL_MEMORY = size_t(8) << 30;

struct Uint3 {
    unsigned x, y, z;
};
struct QuireKernel {
    const char* name;
    unsigned long long params_size;
    const void* function;
};
using Emulate = int (*)(const char*, Uint3, Uint3, unsigned, const void*, unsigned long long);
using Table = const QuireKernel* (*)(int*);
Emulate emulate;
Table table;
const char* fail_file = nullptr;

using Work = std::function<int()>;

struct Device;
struct Graph {
    Device* device;
    std::vector<Work> nodes;
};
struct Stream {
    Device* device;
    std::deque<Work> pending;
    Graph* capturing = nullptr;
};
struct Event {
    Device* device;
    Stream* stream = nullptr;
    uint64_t recorded = 0, done = 0;
    std::chrono::steady_clock::time_point at;
};
struct Module {
    Device* device;
};
struct Function {
    Device* device;
    std::string name;
    size_t params_size;
    int max_dynamic_smem = 48 << 10;
};
struct Block {
    size_t bytes;
    char* mapping;
    size_t mapped;
};

struct Device {
    int ordinal;
    std::recursive_mutex mutex;
    MockCounters counters{};
    std::map<std::string, uint64_t> by_name;
    std::map<uintptr_t, Block> memory;
    std::map<uintptr_t, size_t> pinned;
    std::set<Stream*> streams;
    std::map<std::string, std::unique_ptr<Function>> functions;
    bool delayed = false, idle = false;
    int error = OK;
    long fail_after = -1, fail_in_work = -1;
    int fail_with = OK;
    uint64_t seed = 1;
};

Device& device(int ordinal) {
    static Device* devices = [] {
        auto* all = new Device[DEVICES];
        for (int i = 0; i < DEVICES; ++i) all[i].ordinal = i;
        return all;
    }();
    return devices[ordinal];
}

thread_local Device* current = nullptr;

// Every call that can fail asynchronously counts down to the injected error; afterwards all of them return it.
int gate(Device& d) {
    if (d.error == OK && d.fail_after >= 0 && d.fail_after-- == 0) d.error = d.fail_with;
    if (d.error == OK && fail_file && access(fail_file, F_OK) == 0) {
        d.error = ILLEGAL_ADDRESS;
        if (FILE* file = std::fopen(fail_file, "a")) {
            std::fprintf(file, "%llu\n", static_cast<unsigned long long>(d.counters.device_to_host));
            std::fclose(file);
        }
    }
    return d.error;
}

// What the environment says. The double of cuBLASLt uses functions of this library, so they become visible to all.
void read_environment() {
    fail_file = std::getenv("QUIRE_MOCK_FAIL");
    const char* path = std::getenv("QUIRE_MOCK_KERNELS");
    Dl_info self;
    if (!path || !dladdr(reinterpret_cast<void*>(&read_environment), &self)) return;
    dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL);
    void* kernels = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!kernels) {
        std::fprintf(stderr, "QUIRE_MOCK_KERNELS: %s\n", dlerror());
        return;
    }
    table = reinterpret_cast<Table>(dlsym(kernels, "quire_kernels"));
    emulate = reinterpret_cast<Emulate>(dlsym(kernels, "quire_emulate"));
}

bool inside(const std::map<uintptr_t, Block>& memory, uintptr_t address, size_t bytes) {
    auto next = memory.upper_bound(address);
    if (next == memory.begin()) return false;
    auto& [start, block] = *std::prev(next);
    return address + bytes <= start + block.bytes;
}

bool pinned(const Device& d, const void* address, size_t bytes) {
    auto next = d.pinned.upper_bound(uintptr_t(address));
    if (next == d.pinned.begin()) return false;
    auto& [start, size] = *std::prev(next);
    return uintptr_t(address) + bytes <= start + size;
}

int step(Stream& s) {
    Work work = std::move(s.pending.front());
    s.pending.pop_front();
    Device& d = *s.device;
    if (d.error == OK && d.fail_in_work >= 0 && d.fail_in_work-- == 0) d.error = d.fail_with;
    // A device that has failed does nothing any more.
    if (d.error != OK) return d.error;
    d.counters.work++;
    int result = work();
    if (result != OK && d.error == OK) d.error = result;
    return result;
}

void drain(Stream& s) {
    while (!s.pending.empty()) step(s);
}

int push(Stream& s, Work work) {
    Device& d = *s.device;
    if (int error = gate(d)) return error;
    if (s.capturing) {
        s.capturing->nodes.push_back(std::move(work));
        return OK;
    }
    s.pending.push_back(std::move(work));
    // An error of the work shows at the next call, as with a real device.
    if (!d.delayed) drain(s);
    return OK;
}

void complete(Event& e, uint64_t version) {
    while (e.done < version && e.stream && !e.stream->pending.empty()) step(*e.stream);
}

int launch(Device& d, const Function& f, Uint3 grid, Uint3 block, unsigned smem, const std::vector<char>& params) {
    d.counters.launches++;
    d.by_name[f.name]++;
    if (d.idle) return OK;
    int status = emulate(f.name.c_str(), grid, block, smem, params.data(), d.seed++);
    if (status != 0) std::fprintf(stderr, "%s failed under the double of the driver\n", f.name.c_str());
    return status == 0 ? OK : LAUNCH_FAILED;
}

int copy(void* to, const void* from, size_t bytes, uint64_t* count) {
    ++*count;
    std::memcpy(to, from, bytes);
    return OK;
}

}  // namespace

#define CURRENT                                   \
    if (!current) return INVALID_CONTEXT;         \
    Device& d = *current;                         \
    std::lock_guard<std::recursive_mutex> lock(d.mutex)
#define STREAM                                                      \
    auto& s = *static_cast<Stream*>(stream);                        \
    Device& d = *s.device;                                          \
    std::lock_guard<std::recursive_mutex> lock(d.mutex);            \
    if (!current) return INVALID_CONTEXT;                           \
    if (current != &d || !d.streams.count(&s)) return INVALID_HANDLE

extern "C" {

// What tests control.

void mock_kernels(const void* kernels, const void* run) {
    table = reinterpret_cast<Table>(reinterpret_cast<uintptr_t>(kernels));
    emulate = reinterpret_cast<Emulate>(reinterpret_cast<uintptr_t>(run));
}
void mock_counters(int ordinal, MockCounters* out) {
    std::lock_guard<std::recursive_mutex> lock(device(ordinal).mutex);
    *out = device(ordinal).counters;
}
uint64_t mock_launches_of(int ordinal, const char* name) {
    std::lock_guard<std::recursive_mutex> lock(device(ordinal).mutex);
    return device(ordinal).by_name[name];
}
void mock_delay(int ordinal, int on) { device(ordinal).delayed = on; }
// Kernels and GEMMs do nothing: what is left is the time of the host.
void mock_idle(int ordinal, int on) { device(ordinal).idle = on; }
int mock_is_idle(void* stream) { return static_cast<Stream*>(stream)->device->idle; }
void mock_count_matmul(void* stream) { static_cast<Stream*>(stream)->device->counters.matmuls++; }
void mock_count_collective(void* stream) { static_cast<Stream*>(stream)->device->counters.collectives++; }
int mock_is_device_memory(void* stream, const void* address, size_t bytes) {
    return inside(static_cast<Stream*>(stream)->device->memory, uintptr_t(address), bytes);
}
void mock_fail(int ordinal, long after, int error) {
    device(ordinal).fail_after = after;
    device(ordinal).fail_with = error;
}
void mock_fail_in_work(int ordinal, long after, int error) {
    device(ordinal).fail_in_work = after;
    device(ordinal).fail_with = error;
}
int mock_enqueue(void* stream, const std::function<int()>* work) {
    STREAM;
    return push(s, *work);
}

// Errors.

int cuGetErrorName(int error, const char** name) {
    switch (error) {
        case OK: *name = "CUDA_SUCCESS"; return OK;
        case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; return OK;
        case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return OK;
        case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; return OK;
        case ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; return OK;
        case LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; return OK;
        default: *name = "CUDA_ERROR_UNKNOWN"; return OK;
    }
}
int cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }

// Devices and contexts. A context is its device.

int cuInit(unsigned) {
    static std::once_flag once;
    std::call_once(once, read_environment);
    return OK;
}
int cuDriverGetVersion(int* version) {
    *version = 13000;
    return OK;
}
int cuDeviceGetCount(int* count) {
    *count = DEVICES;
    return OK;
}
int cuDeviceGet(int* out, int ordinal) {
    if (ordinal < 0 || ordinal >= DEVICES) return INVALID_DEVICE;
    *out = ordinal;
    return OK;
}
int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, size_t(length), "Mock GPU");
    return OK;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = TOTAL_MEMORY;
    return OK;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: *value = 4; return OK;         // multiprocessors
        case 75: *value = 9; return OK;         // compute capability, major
        case 76: *value = 0; return OK;         // minor
        case 97: *value = 227 << 10; return OK;  // shared memory per block, opt-in
        default: *value = 0; return INVALID_VALUE;
    }
}
int cuDevicePrimaryCtxRetain(void** context, int ordinal) {
    *context = &device(ordinal);
    return OK;
}
int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
int cuCtxSetCurrent(void* context) {
    current = static_cast<Device*>(context);
    return OK;
}

// Memory.

int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    CURRENT;
    *total = TOTAL_MEMORY;
    *free_bytes = TOTAL_MEMORY - d.counters.live_bytes;
    return OK;
}
int cuMemAlloc_v2(uintptr_t* out, size_t bytes) {
    CURRENT;
    if (int error = gate(d)) return error;
    if (bytes == 0) return INVALID_VALUE;
    if (bytes > TOTAL_MEMORY - d.counters.live_bytes) return OUT_OF_MEMORY;
    // The end touches a guard page, up to the alignment that a real driver promises.
    size_t rounded = (bytes + 255) / 256 * 256, pages = (rounded + GUARD - 1) / GUARD * GUARD;
    auto* mapping = static_cast<char*>(
        mmap(nullptr, pages + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (mapping == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(mapping + GUARD, pages, PROT_READ | PROT_WRITE);
    char* start = mapping + GUARD + pages - rounded;
    // NaN in every float format. Large pools are left as zeros: touching them would cost more than it finds.
    if (bytes <= (size_t(64) << 20)) std::memset(start, 0xff, bytes);
    d.memory[uintptr_t(start)] = {bytes, mapping, pages + 2 * GUARD};
    d.counters.allocations++;
    d.counters.live_allocations++;
    d.counters.live_bytes += bytes;
    *out = uintptr_t(start);
    return OK;
}
int cuMemFree_v2(uintptr_t address) {
    CURRENT;
    auto found = d.memory.find(address);
    if (found == d.memory.end()) return INVALID_VALUE;
    for (Stream* s : d.streams) drain(*s);
    // Stays mapped without access, so that a late use faults.
    mprotect(found->second.mapping, found->second.mapped, PROT_NONE);
    madvise(found->second.mapping, found->second.mapped, MADV_DONTNEED);
    d.counters.live_allocations--;
    d.counters.live_bytes -= found->second.bytes;
    d.memory.erase(found);
    return OK;
}
int cuMemHostAlloc(void** out, size_t bytes, unsigned) {
    CURRENT;
    *out = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    std::memset(*out, 0xff, bytes);
    d.pinned[uintptr_t(*out)] = bytes;
    d.counters.live_pinned++;
    return OK;
}
int cuMemFreeHost(void* address) {
    CURRENT;
    if (!d.pinned.erase(uintptr_t(address))) return INVALID_VALUE;
    std::free(address);
    d.counters.live_pinned--;
    return OK;
}
int cuMemcpyHtoDAsync_v2(uintptr_t to, const void* from, size_t bytes, void* stream) {
    STREAM;
    if (!inside(d.memory, to, bytes) || !pinned(d, from, bytes)) return INVALID_VALUE;
    return push(s, [&d, to, from, bytes] {
        d.counters.host_to_device_bytes += bytes;
        return copy(reinterpret_cast<void*>(to), from, bytes, &d.counters.host_to_device);
    });
}
int cuMemcpyDtoHAsync_v2(void* to, uintptr_t from, size_t bytes, void* stream) {
    STREAM;
    if (!inside(d.memory, from, bytes) || !pinned(d, to, bytes)) return INVALID_VALUE;
    return push(s, [&d, to, from, bytes] {
        return copy(to, reinterpret_cast<void*>(from), bytes, &d.counters.device_to_host);
    });
}
int cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, void* stream) {
    STREAM;
    if (!inside(d.memory, from, bytes) || !inside(d.memory, to, bytes)) return INVALID_VALUE;
    return push(s, [&d, to, from, bytes] {
        return copy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes,
                    &d.counters.device_to_device);
    });
}
struct Rectangle {
    size_t src_x, src_y;
    int src_type;
    const void* src_host;
    uintptr_t src;
    void* src_array;
    size_t src_pitch, dst_x, dst_y;
    int dst_type;
    void* dst_host;
    uintptr_t dst;
    void* dst_array;
    size_t dst_pitch, width, height;
};
int cuMemcpy2DAsync_v2(const Rectangle* given, void* stream) {
    STREAM;
    Rectangle r = *given;
    if (r.src_type != 2 || r.dst_type != 2 || r.src_x || r.src_y || r.dst_x || r.dst_y) return INVALID_VALUE;
    if (!r.height || r.width > r.src_pitch || r.width > r.dst_pitch) return INVALID_VALUE;
    size_t skipped = r.height - 1;
    if (!inside(d.memory, r.src, skipped * r.src_pitch + r.width)) return INVALID_VALUE;
    if (!inside(d.memory, r.dst, skipped * r.dst_pitch + r.width)) return INVALID_VALUE;
    return push(s, [&d, r] {
        d.counters.device_to_device++;
        for (size_t row = 0; row < r.height && !d.idle; ++row) {
            std::memcpy(reinterpret_cast<void*>(r.dst + row * r.dst_pitch),
                        reinterpret_cast<void*>(r.src + row * r.src_pitch), r.width);
        }
        return int(OK);
    });
}
int cuMemsetD8Async(uintptr_t to, unsigned char value, size_t bytes, void* stream) {
    STREAM;
    if (!inside(d.memory, to, bytes)) return INVALID_VALUE;
    return push(s, [&d, to, value, bytes] {
        d.counters.memsets++;
        if (!d.idle) std::memset(reinterpret_cast<void*>(to), value, bytes);
        return int(OK);
    });
}

// Streams and events.

int cuStreamCreate(void** out, unsigned) {
    CURRENT;
    auto* s = new Stream{&d, {}, nullptr};
    d.streams.insert(s);
    d.counters.live_streams++;
    *out = s;
    return OK;
}
int cuStreamDestroy_v2(void* stream) {
    STREAM;
    drain(s);
    d.streams.erase(&s);
    d.counters.live_streams--;
    return OK;  // the object stays, so that a late use is found
}
int cuStreamSynchronize(void* stream) {
    STREAM;
    if (s.capturing) return CAPTURE_UNSUPPORTED;
    if (int error = gate(d)) return error;
    d.counters.synchronizations++;
    drain(s);
    return d.error;
}
int cuStreamWaitEvent(void* stream, void* event, unsigned) {
    STREAM;
    if (s.capturing) return CAPTURE_UNSUPPORTED;
    auto* e = static_cast<Event*>(event);
    return push(s, [e, version = e->recorded] {
        complete(*e, version);
        return int(OK);
    });
}
int cuEventCreate(void** out, unsigned) {
    CURRENT;
    *out = new Event{&d, nullptr, 0, 0, {}};
    d.counters.live_events++;
    return OK;
}
int cuEventDestroy_v2(void* event) {
    CURRENT;
    auto* e = static_cast<Event*>(event);
    complete(*e, e->recorded);
    d.counters.live_events--;
    return OK;
}
int cuEventRecord(void* event, void* stream) {
    STREAM;
    if (s.capturing) return CAPTURE_UNSUPPORTED;
    auto* e = static_cast<Event*>(event);
    e->stream = &s;
    return push(s, [e, version = ++e->recorded] {
        e->done = version;
        e->at = std::chrono::steady_clock::now();
        return int(OK);
    });
}
int cuEventSynchronize(void* event) {
    CURRENT;
    if (int error = gate(d)) return error;
    d.counters.synchronizations++;
    auto* e = static_cast<Event*>(event);
    complete(*e, e->recorded);
    return d.error;
}
int cuEventQuery(void* event) {
    CURRENT;
    if (int error = gate(d)) return error;
    auto* e = static_cast<Event*>(event);
    if (e->done < e->recorded && e->stream) step(*e->stream);
    if (d.error) return d.error;
    return e->done < e->recorded ? NOT_READY : OK;
}
int cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    auto span = static_cast<Event*>(end)->at - static_cast<Event*>(start)->at;
    *milliseconds = std::chrono::duration<float, std::milli>(span).count();
    return OK;
}

// Modules and launches. Whatever the image says, it holds every kernel of the host library.

// What nvcc writes begins with the magic number of a fatbin; its kernels are taken from the host library.
static bool is_image(const void* image) {
    return std::memcmp(image, "mock", 4) == 0 || std::memcmp(image, "\x50\xed\x55\xba", 4) == 0;
}

int cuModuleLoadData(void** out, const void* image) {
    CURRENT;
    if (!image || !is_image(image)) return INVALID_IMAGE;
    d.counters.live_modules++;
    *out = new Module{&d};
    return OK;
}
int cuModuleUnload(void* module) {
    CURRENT;
    delete static_cast<Module*>(module);
    d.counters.live_modules--;
    return OK;
}
int cuModuleGetFunction(void** out, void*, const char* name) {
    CURRENT;
    int count = 0;
    const QuireKernel* rows = table ? table(&count) : nullptr;
    for (int i = 0; i < count; ++i) {
        if (std::strcmp(rows[i].name, name) != 0) continue;
        auto& slot = d.functions[name];
        if (!slot) slot.reset(new Function{&d, name, size_t(rows[i].params_size)});
        *out = slot.get();
        return OK;
    }
    return NOT_FOUND;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8 || value > 227 << 10) return INVALID_VALUE;
    static_cast<Function*>(function)->max_dynamic_smem = value;
    return OK;
}
int cuFuncGetAttribute(int* value, int, void*) {
    *value = 0;
    return OK;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) {
    *blocks = 2;
    return OK;
}

// The double has no copies of boxes: it notes what it was given, for a test to read.
int cuTensorMapEncodeTiled(uint64_t* map, int type, unsigned rank, void* address, const uint64_t* dims,
                           const uint64_t* strides, const unsigned* boxes, const unsigned* steps, int interleave,
                           int swizzle, int promotion, int fill) {
    if (rank != 2 || steps[0] != 1 || steps[1] != 1 || interleave != 0) return INVALID_VALUE;
    const uint64_t noted[] = {uint64_t(uintptr_t(address)), dims[0],       dims[1],          strides[0],    boxes[0],
                              boxes[1],                     uint64_t(type), uint64_t(swizzle), uint64_t(promotion), uint64_t(fill)};
    std::memcpy(map, noted, sizeof noted);
    return OK;
}

struct LaunchAttribute {
    int id;
    char pad[4];
    char value[64];
};
struct LaunchConfig {
    Uint3 grid, block;
    unsigned smem;
    void* stream;
    LaunchAttribute* attributes;
    unsigned num_attributes;
};
int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** params, void**) {
    void* stream = config->stream;
    STREAM;
    auto* f = static_cast<Function*>(function);
    Uint3 g = config->grid, b = config->block;
    if (f->device != &d || !g.x || !g.y || !g.z || !b.x || b.x * b.y * b.z - 1 >= 1024) return INVALID_VALUE;
    if (g.y > 65535 || g.z > 65535 || int(config->smem) > f->max_dynamic_smem) return INVALID_VALUE;
    for (unsigned i = 0; i < config->num_attributes; ++i) d.counters.pdl_launches += config->attributes[i].id == 6;
    if (!s.capturing) d.counters.direct_launches++;
    if (d.idle && !s.capturing) {
        d.counters.launches++;
        return gate(d);
    }
    auto* bytes = static_cast<const char*>(params[0]);
    return push(s, [&d, f, g, b, smem = config->smem, copy = std::vector<char>(bytes, bytes + f->params_size)] {
        return launch(d, *f, g, b, smem, copy);
    });
}

// Graphs.

int cuStreamBeginCapture_v2(void* stream, int) {
    STREAM;
    if (s.capturing) return CAPTURE_UNSUPPORTED;
    s.capturing = new Graph{&d, {}};
    d.counters.live_graphs++;
    return OK;
}
int cuStreamEndCapture(void* stream, void** graph) {
    STREAM;
    if (!s.capturing) return CAPTURE_UNSUPPORTED;
    *graph = s.capturing;
    s.capturing = nullptr;
    return d.error;
}
int cuGraphInstantiateWithFlags(void** out, void* graph, unsigned long long) {
    auto* g = static_cast<Graph*>(graph);
    std::lock_guard<std::recursive_mutex> lock(g->device->mutex);
    g->device->counters.live_graphs++;
    *out = new Graph(*g);
    return OK;
}
static int destroy(void* graph) {
    auto* g = static_cast<Graph*>(graph);
    std::lock_guard<std::recursive_mutex> lock(g->device->mutex);
    g->device->counters.live_graphs--;
    delete g;
    return OK;
}
int cuGraphDestroy(void* graph) { return destroy(graph); }
int cuGraphExecDestroy(void* graph) { return destroy(graph); }
int cuGraphUpload(void*, void*) { return OK; }
int cuGraphLaunch(void* graph, void* stream) {
    STREAM;
    auto* g = static_cast<Graph*>(graph);
    if (s.capturing) return CAPTURE_UNSUPPORTED;
    d.counters.graph_launches++;
    d.counters.graph_nodes += g->nodes.size();
    if (d.idle) return gate(d);
    for (const Work& node : g->nodes) {
        if (int error = push(s, node)) return error;
    }
    return OK;
}

}  // extern "C"
