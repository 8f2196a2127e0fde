// See engine.h. One `Engine` a host thread, made at its first launch and kept to its end: its fibers' stacks are reused.

#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "context.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace quire_emu {

__thread Place* place __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kMaxBarriers = 16;
constexpr uint32_t kMaxSharedBytes = 227 * 1024;
constexpr int kPoison = 0xff;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif
constexpr size_t kGuardBytes = 4096;

/// What `quire_kernels` lists, and beside it the launch bounds.
struct Registry {
    std::vector<QuireKernel> kernels;
    std::vector<uint32_t> max_threads;
};

Registry& registry() {
    static Registry registry;
    return registry;
}

struct Copy {
    void* dst;
    const void* src;
    uint32_t bytes, src_bytes, group;
};

struct Fiber {
    Context context;
    Place place;
    bool done;
    // What it waits for in a collective.
    void (*combine)(void* const*, uint32_t);
    uint32_t mask;
    // The barrier it waits at, or none.
    int barrier;
    // cp.async
    std::vector<Copy> copies;
    uint32_t group;
};

struct Warp {
    uint32_t ready;    // lanes that can run
    uint32_t live;     // lanes that have not ended
    uint32_t waiting;  // lanes in a collective
    void* payload[32];
};

struct Barrier {
    uint32_t waiting, count, trues;
};

struct Free {
    void operator()(unsigned char* p) const { free(p); }
};
using Memory = std::unique_ptr<unsigned char[], Free>;

/// Not a byte more than asked for, so that AddressSanitizer sees an overrun.
Memory allocate(size_t bytes, size_t align) {
    void* p = nullptr;
    if (posix_memalign(&p, std::max(align, sizeof(void*)), bytes) != 0) abort();
    return Memory(static_cast<unsigned char*>(p));
}

struct SharedArray {
    const void* key;
    Memory memory;
    size_t bytes;
    uint64_t block;  // serial number of the block it was poisoned for
};

class Engine {
public:
    // Threads of ranks come and go, and stacks are many.
    ~Engine() {
        for (Fiber& fiber : fibers_) {
            if (fiber.context.stack) munmap(static_cast<char*>(fiber.context.stack) - kGuardBytes, kStackBytes);
        }
    }
    int run(size_t kernel, uint3 grid, uint3 block, uint32_t smem, const void* params, uint64_t seed);
    [[noreturn]] void fail(const char* message);
    void barrier(uint32_t id, uint32_t count);
    int barrier_count(bool predicate);
    void collective(uint32_t mask, void (*combine)(void* const*, uint32_t), void* payload);
    void* shared(const void* key, size_t bytes, size_t align);

    void* dynamic() { return dynamic_.get(); }
    uint32_t dynamic_size() const { return dynamic_bytes_; }
    Fiber& fiber() { return fibers_[current_]; }
    std::string error;

private:
    
    void run_block(uint3 index);
    static void entry();
    /// Runs another fiber; comes back when this one is chosen again.
    void suspend();
    /// Chooses who runs next; kMaxThreads when nobody can.
    uint32_t choose();
    void release(uint32_t id);
    void make_ready(uint32_t thread) {
        warps_[thread / 32].ready |= 1u << (thread % 32);
        ready_warps_ |= 1u << (thread / 32);
    }
    void make_unready(uint32_t thread) {
        Warp& warp = warps_[thread / 32];
        warp.ready &= ~(1u << (thread % 32));
        if (warp.ready == 0) ready_warps_ &= ~(1u << (thread / 32));
    }
    [[noreturn]] void fail_divergent();
    uint32_t random() {
        rng_ ^= rng_ << 13, rng_ ^= rng_ >> 7, rng_ ^= rng_ << 17;
        return uint32_t(rng_ >> 32);
    }

    const QuireKernel* kernel_ = nullptr;
    Memory params_;
    uint32_t threads_ = 0, live_ = 0, current_ = 0, ready_warps_ = 0;
    uint64_t rng_ = 1, block_serial_ = 0;
    dim3 block_dim_, grid_dim_;
    Context main_;
    std::vector<Fiber> fibers_;
    Warp warps_[kMaxThreads / 32];
    Barrier barriers_[kMaxBarriers];
    int released_trues_ = 0;
    std::vector<SharedArray> shared_;
    Memory dynamic_;
    uint32_t dynamic_bytes_ = 0;
    bool failed_ = false;
};

thread_local std::unique_ptr<Engine> engine_of_thread;
__thread Engine* engine __attribute__((tls_model("initial-exec"))) = nullptr;

const char* check_launch(uint32_t max_threads, uint3 grid, uint3 block, uint32_t smem) {
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > max_threads) return "a block has no threads, or more than its launch bounds";
    if (block.z > 64) return "more than 64 threads along z";
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "the grid is empty";
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "the grid is larger than the hardware allows";
    if (smem > kMaxSharedBytes) return "more dynamic shared memory than a block can have";
    return nullptr;
}

int Engine::run(size_t index, uint3 grid, uint3 block, uint32_t smem, const void* params, uint64_t seed) {
    const QuireKernel& kernel = registry().kernels[index];
    kernel_ = &kernel, failed_ = false, error.clear();
    if (const char* wrong = check_launch(registry().max_threads[index], grid, block, smem)) {
        char text[512];
        snprintf(text, sizeof text, "%s: %s (grid %u,%u,%u block %u,%u,%u, %u bytes)", kernel.name, wrong, grid.x,
                 grid.y, grid.z, block.x, block.y, block.z, smem);
        error = text;
        return 1;
    }
    params_ = allocate(size_t(kernel.params_size), 16);
    std::memcpy(params_.get(), params, kernel.params_size);
    rng_ = (seed + 1) * 0x9E3779B97F4A7C15ull | 1;
    for (int i = 0; i < 4; ++i) random();
    block_dim_ = block, grid_dim_ = grid;
    threads_ = block.x * block.y * block.z;
    shared_.clear();
    dynamic_bytes_ = smem;
    dynamic_ = allocate(smem, 128);

    if (fibers_.size() < threads_) fibers_.resize(kMaxThreads);
    for (uint32_t t = 0; t < threads_; ++t) {
        Context& context = fibers_[t].context;
        if (context.stack) continue;
        void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
            error = "no memory for the stacks of the emulated threads";
            return 1;
        }
        context.stack = static_cast<char*>(memory) + kGuardBytes;
        context.stack_size = kStackBytes - kGuardBytes;
    }

    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    std::vector<uint32_t> order(blocks);
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t j = random() % (i + 1);
        order[i] = order[j];
        order[j] = uint32_t(i);
    }
    for (uint32_t b : order) {
        run_block({b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y});
        if (failed_) return 1;
    }
    return 0;
}

void Engine::run_block(uint3 index) {
    ++block_serial_;
    if (dynamic_bytes_) std::memset(dynamic_.get(), kPoison, dynamic_bytes_);
    std::memset(barriers_, 0, sizeof barriers_);
    std::memset(warps_, 0, sizeof warps_);
    ready_warps_ = 0, live_ = threads_;
    for (uint32_t t = 0; t < threads_; ++t) {
        Fiber& fiber = fibers_[t];
        fiber.done = false, fiber.barrier = -1, fiber.group = 0;
        fiber.copies.clear();
        const uint3 thread{t % block_dim_.x, t / block_dim_.x % block_dim_.y, t / block_dim_.x / block_dim_.y};
        fiber.place = {thread, index, block_dim_, grid_dim_, t % 32};
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(fiber.context.stack, fiber.context.stack_size);
#endif
        prepare(fiber.context, &Engine::entry);
        warps_[t / 32].live |= 1u << (t % 32);
        make_ready(t);
    }
    current_ = choose();
    place = &fiber().place;
    switch_to(main_, fiber().context);
    place = nullptr;
}

void Engine::entry() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (engine->main_.stack == nullptr) engine->main_.stack = const_cast<void*>(bottom), engine->main_.stack_size = size;
#endif
    Engine& self = *engine;
    self.kernel_->entry(self.params_.get());
    const uint32_t me = self.current_;
    self.fiber().done = true;
    self.warps_[me / 32].live &= ~(1u << (me % 32));
    self.make_unready(me);
    --self.live_;
    // The others may have been waiting for this one's end.
    for (uint32_t id = 0; id < kMaxBarriers; ++id) {
        const Barrier& at = self.barriers_[id];
        if (at.waiting && at.count == 0 && at.waiting == self.live_) self.release(id);
    }
    self.suspend();
    abort();  // A fiber that ended is never chosen again.
}

uint32_t Engine::choose() {
    if (!ready_warps_) return kMaxThreads;
    // The same warp while it can: it mostly waits for its other lanes. Now and then another.
    uint32_t warp = current_ / 32;
    const uint32_t draw = random();
    if (warp >= kMaxThreads / 32 || !warps_[warp].ready || (draw & 15) == 0) {
        const uint32_t turn = draw >> 8 & 31;
        const uint32_t turned = ready_warps_ >> turn | (turn ? ready_warps_ << (32 - turn) : 0);
        warp = (uint32_t(__builtin_ctz(turned)) + turn) & 31;
    }
    const uint32_t ready = warps_[warp].ready, turn = draw >> 16 & 31;
    const uint32_t turned = ready >> turn | (turn ? ready << (32 - turn) : 0);
    return warp * 32 + ((uint32_t(__builtin_ctz(turned)) + turn) & 31);
}

void Engine::suspend() {
    const uint32_t me = current_;
    const uint32_t next = choose();
    if (next == me) return;
    if (next == kMaxThreads) {
        if (live_ != 0) fail_divergent();
        switch_to(fibers_[me].context, main_);
        return;
    }
    current_ = next;
    place = &fibers_[next].place;
    switch_to(fibers_[me].context, fibers_[next].context);
}

void Engine::fail_divergent() {
    uint32_t at_barrier = 0, in_collective = 0, first_barrier = kMaxThreads, first_collective = kMaxThreads;
    for (uint32_t t = 0; t < threads_; ++t) {
        if (fibers_[t].done) continue;
        uint32_t& first = fibers_[t].barrier >= 0 ? first_barrier : first_collective;
        (fibers_[t].barrier >= 0 ? at_barrier : in_collective) += 1;
        first = std::min(first, t);
    }
    char text[256];
    snprintf(text, sizeof text,
             "threads diverge at a barrier: of %u threads %u ended, %u wait at a block barrier (first: %d), %u in a "
             "warp collective (first: %d), and none can go on",
             threads_, threads_ - live_, at_barrier, at_barrier ? int(first_barrier) : -1, in_collective,
             in_collective ? int(first_collective) : -1);
    fail(text);
}

void Engine::fail(const char* message) {
    const uint3 b = fiber().place.block_idx, t = fiber().place.thread_idx;
    char text[1024];
    snprintf(text, sizeof text, "%s, block (%u,%u,%u), thread (%u,%u,%u): %s", kernel_->name, b.x, b.y, b.z, t.x, t.y,
             t.z, message);
    error = text, failed_ = true;
    switch_to(fiber().context, main_);
    abort();  // The fibers of a failed launch are never continued.
}

void Engine::release(uint32_t id) {
    released_trues_ = int(barriers_[id].trues);
    barriers_[id] = {};
    for (uint32_t t = 0; t < threads_; ++t) {
        if (!fibers_[t].done && fibers_[t].barrier == int(id)) {
            fibers_[t].barrier = -1;
            make_ready(t);
        }
    }
}

void Engine::barrier(uint32_t id, uint32_t count) {
    if (id >= kMaxBarriers || count % 32 != 0) fail("a block has barriers 0 to 15, for whole warps");
    Barrier& at = barriers_[id];
    if (at.waiting && at.count != count) fail("threads bring different counts to one barrier");
    at.count = count;
    ++at.waiting;
    if (count > live_) fail("a barrier waits for more threads than are left");
    fiber().barrier = int(id);
    make_unready(current_);
    if (at.waiting == (count ? count : live_)) release(id);
    suspend();
}

int Engine::barrier_count(bool predicate) {
    barriers_[0].trues += predicate;
    barrier(0, 0);
    return released_trues_;
}

void Engine::collective(uint32_t mask, void (*combine)(void* const*, uint32_t), void* payload) {
    const uint32_t me = current_, lane = me % 32, first = me - lane;
    Warp& warp = warps_[me / 32];
    if (!(mask >> lane & 1)) fail("a lane calls a warp collective without being in its mask");
    if (mask & ~warp.live) {
        // Lanes past the end of the block do not exist; CUDA lets full masks name them.
        const uint32_t existing = threads_ - first >= 32 ? ~0u : (1u << (threads_ - first)) - 1;
        if (mask & existing & ~warp.live) fail("a warp collective names lanes that have ended");
        mask &= existing;
    }
    Fiber& self = fibers_[me];
    self.combine = combine, self.mask = mask;
    warp.payload[lane] = payload;
    warp.waiting |= 1u << lane;
    if ((warp.waiting & mask) != mask) {
        make_unready(me);
        suspend();
        return;
    }
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        const Fiber& other = fibers_[first + uint32_t(__builtin_ctz(rest))];
        if (other.combine != combine || other.mask != mask) fail("the lanes of a warp meet in different collectives");
    }
    combine(warp.payload, mask);
    warp.waiting &= ~mask;
    warp.ready |= mask;
    ready_warps_ |= 1u << (me / 32);
}

void* Engine::shared(const void* key, size_t bytes, size_t align) {
    auto at = std::find_if(shared_.begin(), shared_.end(), [&](const SharedArray& a) { return a.key == key; });
    if (at == shared_.end()) {
        shared_.push_back({key, allocate(bytes, align), bytes, 0});
        at = shared_.end() - 1;
    }
    if (at->block != block_serial_) {
        at->block = block_serial_;
        std::memset(at->memory.get(), kPoison, bytes);
    }
    return at->memory.get();
}

}  // namespace

Registration::Registration(const char* name, uint32_t params_size, uint32_t max_threads, void (*entry)(const void*)) {
    registry().kernels.push_back({name, params_size, entry});
    registry().max_threads.push_back(max_threads);
}

void fail(const char* format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    engine->fail(text);
}

void barrier(uint32_t id, uint32_t count) { engine->barrier(id, count); }
int barrier_count(bool predicate) { return engine->barrier_count(predicate); }
void collective(uint32_t mask, void (*combine)(void* const*, uint32_t), void* payload) {
    engine->collective(mask, combine, payload);
}
void* shared(const void* key, size_t bytes, size_t align) { return engine->shared(key, bytes, align); }
void* dynamic_shared() { return engine->dynamic(); }
uint32_t dynamic_shared_size() { return engine->dynamic_size(); }

void async_copy(void* dst, const void* src, uint32_t bytes, uint32_t src_bytes) {
    if (reinterpret_cast<uintptr_t>(dst) % bytes || (src_bytes && reinterpret_cast<uintptr_t>(src) % bytes)) {
        fail("cp.async of %u bytes: misaligned source %p or destination %p", bytes, src, dst);
    }
    Fiber& fiber = engine->fiber();
    fiber.copies.push_back({dst, src, bytes, src_bytes, fiber.group});
}

void async_commit() { ++engine->fiber().group; }

void async_wait(uint32_t pending) {
    Fiber& fiber = engine->fiber();
    size_t kept = 0;
    for (const Copy& copy : fiber.copies) {
        if (copy.group + pending >= fiber.group) {
            fiber.copies[kept++] = copy;
            continue;
        }
        std::memcpy(copy.dst, copy.src, copy.src_bytes);
        std::memset(static_cast<char*>(copy.dst) + copy.src_bytes, 0, copy.bytes - copy.src_bytes);
    }
    fiber.copies.resize(kept);
}

}  // namespace quire_emu

const QuireKernel* quire_kernels(int* count) {
    *count = int(quire_emu::registry().kernels.size());
    return quire_emu::registry().kernels.data();
}

int quire_emulate(const char* name, uint3 grid, uint3 block, unsigned dynamic_smem, const void* params,
                  unsigned long long seed) {
    using namespace quire_emu;
    if (!engine_of_thread) engine_of_thread.reset(new Engine);
    engine = engine_of_thread.get();
    const auto& kernels = registry().kernels;
    for (size_t i = 0; i < kernels.size(); ++i) {
        if (std::strcmp(kernels[i].name, name) == 0) return engine->run(i, grid, block, dynamic_smem, params, seed);
    }
    engine->error = std::string("there is no kernel ") + name;
    return 1;
}

const char* quire_emulate_error() {
    return quire_emu::engine_of_thread ? quire_emu::engine_of_thread->error.c_str() : "";
}
