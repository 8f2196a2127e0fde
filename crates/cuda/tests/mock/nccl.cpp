// NCCL between devices of the double: what the backend uses of it. A collective waits on its stream until all ranks have come
// to theirs; the last one does the work for all, adding in the order of the ranks. As with the real library, a rank whose
// communicator is aborted goes on at once, and the others wait for ever.
#include "mock.h"

#include <cmath>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

extern "C" int mock_is_idle(void* stream);
extern "C" void mock_count_collective(void* stream);
extern "C" int mock_is_device_memory(void* stream, const void* address, size_t bytes);

namespace {

enum Result { OK = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5 };
enum Type { F16 = 6, F32 = 7, BF16 = 9 };
enum Kind { ALL_REDUCE, ALL_GATHER };
constexpr int LAUNCH_FAILED = 719;

size_t size_of(int type) { return type == F32 ? 4 : type == F16 || type == BF16 ? 2 : 0; }

float read(const char* from, int type) {
    if (type == F32) {
        float value;
        std::memcpy(&value, from, 4);
        return value;
    }
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    if (type == BF16) {
        uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
}

void write(char* to, int type, float value) {
    if (type == F32) {
        std::memcpy(to, &value, 4);
    } else if (type == F16) {
        _Float16 half = _Float16(value);
        std::memcpy(to, &half, 2);
    } else {
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        uint16_t bits = std::isnan(value) ? 0x7fff : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
        std::memcpy(to, &bits, 2);
    }
}

struct Call {
    Kind kind;
    int type;
    size_t count;
    const char* from;
    char* to;
};

struct Group {
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<Call> calls;
    std::vector<bool> aborted;
    size_t arrived = 0;
    uint64_t done = 0;

    bool agree() const {
        for (const Call& c : calls) {
            if (c.kind != calls[0].kind || c.type != calls[0].type || c.count != calls[0].count) return false;
        }
        return true;
    }

    void finish() {
        size_t bytes = calls[0].count * size_of(calls[0].type);
        std::vector<char> result(calls[0].kind == ALL_REDUCE ? bytes : bytes * calls.size());
        if (calls[0].kind == ALL_GATHER) {
            for (size_t rank = 0; rank < calls.size(); ++rank) {
                std::memcpy(result.data() + rank * bytes, calls[rank].from, bytes);
            }
        } else {
            size_t step = size_of(calls[0].type);
            for (size_t at = 0; at < bytes; at += step) {
                float sum = read(calls[0].from + at, calls[0].type);
                for (size_t rank = 1; rank < calls.size(); ++rank) sum += read(calls[rank].from + at, calls[0].type);
                write(result.data() + at, calls[0].type, sum);
            }
        }
        for (const Call& c : calls) std::memcpy(c.to, result.data(), result.size());
    }

    int meet(size_t rank, const Call& call) {
        std::unique_lock<std::mutex> lock(mutex);
        if (aborted[rank]) return OK;
        calls[rank] = call;
        if (++arrived == calls.size()) {
            arrived = 0;
            bool fits = agree();
            if (fits) finish();
            ++done;
            changed.notify_all();
            return fits ? int(OK) : LAUNCH_FAILED;
        }
        uint64_t before = done;
        changed.wait(lock, [&] { return done > before || aborted[rank]; });
        if (done == before) --arrived;  // what it brought may be freed now
        return OK;
    }
};

struct Comm {
    std::shared_ptr<Group> group;
    size_t rank;
};

int enqueue(Call call, size_t sent, size_t received, void* handle, void* stream) {
    size_t size = size_of(call.type);
    if (!handle || !size || !call.count) return INVALID_ARGUMENT;
    if (!mock_is_device_memory(stream, call.from, sent * size)) return INVALID_ARGUMENT;
    if (!mock_is_device_memory(stream, call.to, received * size)) return INVALID_ARGUMENT;
    Comm comm = *static_cast<Comm*>(handle);
    std::function<int()> work = [call, comm, stream] {
        mock_count_collective(stream);
        return mock_is_idle(stream) ? int(OK) : comm.group->meet(comm.rank, call);
    };
    return mock_enqueue(stream, &work) == 0 ? OK : SYSTEM_ERROR;
}

}  // namespace

extern "C" {

const char* ncclGetErrorString(int status) {
    switch (status) {
        case OK: return "no error";
        case SYSTEM_ERROR: return "unhandled cuda error";
        case INVALID_ARGUMENT: return "invalid argument";
        default: return "invalid usage";
    }
}
int ncclCommInitAll(void** comms, int count, const int* devices) {
    if (count < 1) return INVALID_ARGUMENT;
    for (int i = 0; i < count; ++i) {
        for (int j = 0; j < i; ++j) {
            if (devices[i] == devices[j]) return INVALID_USAGE;
        }
    }
    auto group = std::make_shared<Group>();
    group->calls.resize(size_t(count));
    group->aborted.resize(size_t(count));
    for (int rank = 0; rank < count; ++rank) comms[rank] = new Comm{group, size_t(rank)};
    return OK;
}
int ncclCommAbort(void* handle) {
    auto* comm = static_cast<Comm*>(handle);
    {
        std::lock_guard<std::mutex> lock(comm->group->mutex);
        comm->group->aborted[comm->rank] = true;
        comm->group->changed.notify_all();
    }
    delete comm;
    return OK;
}
int ncclAllReduce(const void* from, void* to, size_t count, int type, int op, void* comm, void* stream) {
    if (op != 0) return INVALID_ARGUMENT;
    Call call{ALL_REDUCE, type, count, static_cast<const char*>(from), static_cast<char*>(to)};
    return enqueue(call, count, count, comm, stream);
}
int ncclAllGather(const void* from, void* to, size_t count, int type, void* comm, void* stream) {
    Call call{ALL_GATHER, type, count, static_cast<const char*>(from), static_cast<char*>(to)};
    size_t ranks = comm ? static_cast<Comm*>(comm)->group->calls.size() : 0;
    return enqueue(call, count, ranks * count, comm, stream);
}

}  // extern "C"
