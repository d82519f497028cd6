// Emulates on the CPU the functions of NVIDIA's driver that candle and we call, so that the code that uses a GPU can be
// tested without one. It does not measure speed.
//
// The emulation exposes mistakes that can go unnoticed on a GPU. Queued work runs late, when the caller waits for it or
// queries its state, so data that is read or overwritten too early is wrong. New memory holds NaN, freed memory is
// unmapped, and the page behind each allocation is inaccessible.

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "kernels.h"

void add_our_kernels();
void add_candle_kernels();

std::map<std::string, Bind> &kernels() {
    static std::map<std::string, Bind> all;
    return all;
}

namespace {

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, NOT_FOUND = 500, NOT_READY = 600, TRAPPED = 719 };

uint64_t total_bytes() {
    const char *set = getenv("EMULATED_GPU_BYTES");
    return set ? strtoull(set, nullptr, 10) : 4ull << 30;
}
constexpr size_t PAGE = 4096;

// The number of calls that hand the GPU work or memory: launches, products, allocations, frees, copies and fills. On a
// GPU each of them costs the caller microseconds.
std::atomic<unsigned long long> calls = 0;

// All threads share one driver.
std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

// The error of a kernel that has failed. Every later call returns it.
int fault = OK;
std::string running;

struct Allocation {
    char *map;
    size_t mapped, bytes;
};
std::map<uint64_t, Allocation> allocations;
uint64_t used_bytes = 0, peak_bytes = 0;
// The memory that the pool has reserved on the GPU. It includes freed allocations until the pool is trimmed down to the
// threshold, which happens whenever the caller waits for a stream.
uint64_t reserved_bytes = 0, threshold_bytes = 0;

void trim_pool(uint64_t keep) {
    if (reserved_bytes > keep) reserved_bytes = std::max(used_bytes, keep);
}
std::map<char *, size_t> pinned;

// Returns whether host memory is page-locked. Copies to and from such memory run when the queue reaches them.
bool is_pinned(const void *at) {
    auto next = pinned.upper_bound((char *)at);
    if (next == pinned.begin()) return false;
    --next;
    return (char *)at < next->first + next->second;
}

using Graph = std::vector<std::function<void()>>;

struct Queue {
    std::deque<std::function<void()>> work;
    uint64_t enqueued = 0, done = 0;
    // What is queued while a graph is captured. It does not run.
    Graph *captured = nullptr;

    void enqueue(std::function<void()> one) {
        if (captured) {
            captured->push_back(std::move(one));
            return;
        }
        work.push_back(std::move(one));
        enqueued++;
    }
    void run_one() {
        auto one = std::move(work.front());
        work.pop_front();
        if (fault == OK) one();
        done++;
    }
    void run_until(uint64_t count) {
        while (done < count) run_one();
    }
};

struct Event {
    Queue *queue = nullptr;
    uint64_t count = 0;
};

// The bytes of dynamic shared memory that a block may use unless the caller raises the function's limit, and the highest
// limit of a GPU of compute capability 8.6, which offers the least.
constexpr unsigned USUAL_SHARED = 48 << 10, MOST_SHARED = 99 << 10;

struct Function {
    std::string name;
    unsigned most_shared = USUAL_SHARED;
};
struct Module {
    std::map<std::string, Function> functions;
};

std::set<Queue *> queues;

Queue *queue_of(void *stream) {
    // 0 to 2 are the default streams of a context and of a thread.
    static Queue shared;
    return (uintptr_t)stream <= 2 ? &shared : (Queue *)stream;
}

int allocate(uint64_t *out, size_t bytes) {
    if (used_bytes + bytes > total_bytes()) return OUT_OF_MEMORY;
    // The allocation ends at the inaccessible page and begins with the alignment of the widest load.
    const size_t size = (bytes + 15) / 16 * 16, mapped = (size + PAGE - 1) / PAGE * PAGE + PAGE;
    char *map = (char *)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(map + mapped - PAGE, PAGE, PROT_NONE);
    char *at = map + mapped - PAGE - size;
    memset(at, 0xff, size);
    allocations[(uint64_t)at] = {map, mapped, bytes};
    used_bytes += bytes;
    peak_bytes = std::max(peak_bytes, used_bytes);
    reserved_bytes = std::max(reserved_bytes, used_bytes);
    *out = (uint64_t)at;
    return OK;
}

// Frees an allocation. It counts as free immediately, because work that is queued later may reuse it. It is unmapped
// when `queue` reaches this point.
int release(uint64_t at, Queue *queue) {
    auto found = allocations.find(at);
    if (found == allocations.end()) return INVALID_VALUE;
    const Allocation allocation = found->second;
    allocations.erase(found);
    used_bytes -= allocation.bytes;
    queue->enqueue([allocation] { munmap(allocation.map, allocation.mapped); });
    return OK;
}

void on_bad_address(int) {
    fprintf(stderr, "emulated GPU: access to unmapped memory, in or after `%s`\n", running.c_str());
    _exit(99);
}

}  // namespace

#define CALL                \
    Lock lock(mutex);       \
    if (fault) return fault
#define COUNTED_CALL \
    calls++;         \
    CALL

extern "C" {

int cuInit(unsigned) {
    Lock lock(mutex);
    if (kernels().empty()) {
        add_our_kernels();
        add_candle_kernels();
        signal(SIGSEGV, on_bad_address);
        fprintf(stderr, "emulated GPU: the driver is emulated on the CPU\n");
    }
    return OK;
}
int cuDriverGetVersion(int *version) {
    const char *set = getenv("EMULATED_DRIVER_VERSION");
    *version = set ? atoi(set) : 13000;
    return OK;
}
int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? OK : INVALID_DEVICE;
}
int cuDeviceGetAttribute(int *value, int attribute, int) {
    // Memory pools are supported (115). The compute capability (75, 76) is 9.0 unless the environment says another.
    const char *set = getenv("EMULATED_GPU_CAPABILITY");
    const std::string capability = set ? set : "9.0";
    *value = attribute == 115 ? 1 : attribute == 75 ? atoi(capability.c_str()) : attribute == 76 ? atoi(capability.substr(capability.find('.') + 1).c_str()) : 0;
    return OK;
}
int cuDevicePrimaryCtxRetain(void **context, int) {
    static int only;
    *context = &only;
    return OK;
}
int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
static thread_local void *context;
int cuCtxGetCurrent(void **out) {
    *out = context;
    return OK;
}
int cuCtxSetCurrent(void *next) {
    context = next;
    return OK;
}
int cuCtxDestroy_v2(void *) { return OK; }
int cuCtxSynchronize() {
    CALL;
    for (Queue *queue : queues) queue->run_until(queue->enqueued);
    queue_of(nullptr)->run_until(queue_of(nullptr)->enqueued);
    return fault;
}

int cuMemAllocAsync(uint64_t *out, size_t bytes, void *) {
    COUNTED_CALL;
    return allocate(out, bytes);
}
int cuMemAlloc_v2(uint64_t *out, size_t bytes) {
    COUNTED_CALL;
    return allocate(out, bytes);
}
int cuMemFreeAsync(uint64_t at, void *stream) {
    COUNTED_CALL;
    return release(at, queue_of(stream));
}
int cuMemFree_v2(uint64_t at) {
    COUNTED_CALL;
    return release(at, queue_of(nullptr));
}
int cuMemHostAlloc(void **out, size_t bytes, unsigned) {
    CALL;
    *out = malloc(bytes);
    pinned[(char *)*out] = bytes;
    return OK;
}
int cuMemFreeHost(void *at) {
    Lock lock(mutex);
    if (!pinned.erase((char *)at)) return INVALID_VALUE;
    free(at);
    return fault;
}
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    CALL;
    *total = total_bytes();
    *free = *total - reserved_bytes;
    return OK;
}
int cuDeviceGetMemPool(void **pool, int) {
    static int only;
    *pool = &only;
    return OK;
}
int cuMemPoolGetAttribute(void *, int attribute, void *value) {
    CALL;
    // The threshold (4), the bytes reserved now (5), used now (7) and used at most (8).
    *(uint64_t *)value = attribute == 4   ? threshold_bytes
                         : attribute == 5 ? reserved_bytes
                         : attribute == 7 ? used_bytes
                                          : peak_bytes;
    return OK;
}
int cuMemPoolSetAttribute(void *, int attribute, void *value) {
    CALL;
    if (attribute == 4) threshold_bytes = *(uint64_t *)value;
    if (attribute == 8) {
        if (*(uint64_t *)value != 0) return INVALID_VALUE;
        peak_bytes = used_bytes;
    }
    return OK;
}
int cuMemPoolTrimTo(void *, size_t keep) {
    CALL;
    trim_pool(keep);
    return OK;
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    COUNTED_CALL;
    if (is_pinned(from)) {
        queue_of(stream)->enqueue([=] { memcpy((void *)to, from, bytes); });
    } else {
        // Pageable memory is read before the call returns.
        std::string staged((const char *)from, bytes);
        queue_of(stream)->enqueue([=] { memcpy((void *)to, staged.data(), bytes); });
    }
    return OK;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    COUNTED_CALL;
    Queue *queue = queue_of(stream);
    queue->enqueue([=] { memcpy(to, (void *)from, bytes); });
    // Pageable memory is written before the call returns.
    if (!is_pinned(to)) queue->run_until(queue->enqueued);
    return fault;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) {
    COUNTED_CALL;
    queue_of(stream)->enqueue([=] { memmove((void *)to, (void *)from, bytes); });
    return OK;
}
int cuMemcpyPeerAsync(uint64_t, void *, uint64_t, void *, size_t, void *) { return INVALID_VALUE; }
int cuMemsetD8Async(uint64_t at, unsigned char value, size_t bytes, void *stream) {
    COUNTED_CALL;
    queue_of(stream)->enqueue([=] { memset((void *)at, value, bytes); });
    return OK;
}

int cuModuleLoadData(void **module, const void *) {
    CALL;
    *module = new Module;
    return OK;
}
int cuModuleLoad(void **, const char *) { return NOT_FOUND; }
int cuModuleUnload(void *module) {
    Lock lock(mutex);
    delete (Module *)module;
    return fault;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    CALL;
    if (!kernels().count(name) && strcmp(name, "trap_all") != 0) {
        fprintf(stderr, "emulated GPU: unknown kernel `%s`\n", name);
        return NOT_FOUND;
    }
    Function &found = ((Module *)module)->functions[name];
    found.name = name;
    *function = &found;
    return OK;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    CALL;
    // Only the limit of dynamic shared memory (8).
    if (attribute != 8 || value < 0 || (unsigned)value > MOST_SHARED) return INVALID_VALUE;
    ((Function *)function)->most_shared = std::max((unsigned)value, USUAL_SHARED);
    return OK;
}
int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void *stream, void **parameters, void **) {
    COUNTED_CALL;
    const std::string name = ((Function *)function)->name;
    if (grid_x == 0 || grid_y == 0 || grid_y > 65535 || grid_z != 1 || block_x == 0 || block_x > 1024 || block_y != 1 ||
        block_z != 1) {
        fprintf(stderr, "emulated GPU: the grid or block size of `%s` is not supported by any GPU\n", name.c_str());
        return INVALID_VALUE;
    }
    if (shared_bytes > ((Function *)function)->most_shared) {
        fprintf(stderr, "emulated GPU: `%s` needs more shared memory than its limit\n", name.c_str());
        return INVALID_VALUE;
    }
    if (name == "trap_all") {
        queue_of(stream)->enqueue([] { fault = TRAPPED; });
        return OK;
    }
    const Run run = kernels()[name](parameters);
    queue_of(stream)->enqueue([=] {
        running = name;
        run({grid_x, grid_y, block_x, shared_bytes});
    });
    return OK;
}

int cuStreamCreate(void **stream, unsigned) {
    CALL;
    Queue *queue = new Queue;
    queues.insert(queue);
    *stream = queue;
    return OK;
}
int cuStreamDestroy_v2(void *stream) {
    Lock lock(mutex);
    // As on a GPU, queued work still runs.
    Queue *queue = (Queue *)stream;
    queue->run_until(queue->enqueued);
    return fault;
}
int cuStreamSynchronize(void *stream) {
    CALL;
    Queue *queue = queue_of(stream);
    // 900: not permitted while a graph is captured.
    if (queue->captured) return 900;
    queue->run_until(queue->enqueued);
    trim_pool(threshold_bytes);
    return fault;
}
int cuStreamWaitEvent(void *, void *event, unsigned) {
    CALL;
    Event *own = (Event *)event;
    if (own->queue) own->queue->run_until(own->count);
    return fault;
}
int cuStreamIsCapturing(void *stream, int *status) {
    CALL;
    *status = queue_of(stream)->captured ? 1 : 0;
    return OK;
}
int cuStreamBeginCapture_v2(void *stream, int) {
    CALL;
    Queue *queue = queue_of(stream);
    if (queue->captured) return INVALID_VALUE;
    queue->captured = new Graph;
    return OK;
}
int cuStreamEndCapture(void *stream, void **graph) {
    CALL;
    Queue *queue = queue_of(stream);
    if (!queue->captured) return INVALID_VALUE;
    *graph = queue->captured;
    queue->captured = nullptr;
    return OK;
}
int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long) {
    CALL;
    *executable = new Graph(*(Graph *)graph);
    return OK;
}
int cuGraphLaunch(void *executable, void *stream) {
    COUNTED_CALL;
    // The graph may be destroyed before it has run.
    for (const auto &one : *(Graph *)executable) queue_of(stream)->enqueue(one);
    return OK;
}
int cuGraphExecDestroy(void *executable) {
    Lock lock(mutex);
    delete (Graph *)executable;
    return fault;
}
int cuGraphDestroy(void *graph) {
    Lock lock(mutex);
    delete (Graph *)graph;
    return fault;
}
int cuEventCreate(void **event, unsigned) {
    CALL;
    *event = new Event;
    return OK;
}
int cuEventDestroy_v2(void *event) {
    Lock lock(mutex);
    delete (Event *)event;
    return fault;
}
int cuEventRecord(void *event, void *stream) {
    CALL;
    Queue *queue = queue_of(stream);
    *(Event *)event = {queue, queue->enqueued};
    return OK;
}
int cuEventSynchronize(void *event) {
    CALL;
    Event *own = (Event *)event;
    if (own->queue) own->queue->run_until(own->count);
    return fault;
}
int cuEventQuery(void *event) {
    CALL;
    Event *own = (Event *)event;
    if (!own->queue || own->queue->done >= own->count) return OK;
    own->queue->run_one();
    return fault ? fault : NOT_READY;
}

// Queues work for the emulated cuBLAS.
int emulated_enqueue(void *stream, void (*run)(void *), void *argument, void (*destroy)(void *)) {
    const std::shared_ptr<void> owned(argument, destroy);
    COUNTED_CALL;
    queue_of(stream)->enqueue([=] {
        running = "a matrix product";
        run(owned.get());
    });
    return OK;
}

// Returns the number of counted calls since the start of the process. Tests read it through dlsym.
unsigned long long emulated_calls(void) {
    return calls;
}

int cuGetErrorName(int error, const char **name) {
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == TRAPPED ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR";
    return OK;
}
int cuGetErrorString(int error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : error == TRAPPED ? "unspecified launch failure" : "an error";
    return OK;
}

}
