#include "threads.hpp"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quire {
namespace {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Look for a change for about this long before sleeping: the gap between two layers' kernels.
constexpr auto PATIENCE = std::chrono::microseconds(50);

}  // namespace

ThreadPool::ThreadPool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard<std::mutex> lock(state_);
        stopping_ = true;
        ++calls_;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void ThreadPool::claim(const Work& work, int64_t count) {
    for (int64_t i; (i = next_.fetch_add(1)) < count;) work(i);
}

void ThreadPool::run(int64_t count, const Work& work) {
    if (count <= 1 || workers_.empty()) {
        for (int64_t i = 0; i < count; ++i) work(i);
        return;
    }
    std::lock_guard<std::mutex> one(call_);
    {
        std::lock_guard<std::mutex> lock(state_);
        work_ = &work, count_ = count;
        next_ = 0;
        ++calls_;
    }
    wake_.notify_all();
    claim(work, count);
    {
        std::lock_guard<std::mutex> lock(state_);
        work_ = nullptr;  // nobody joins any more
    }
    for (int spins = 0; inside_ > 0; ++spins) {
        if (spins < 1000) pause();
        else std::this_thread::yield();
    }
}

void ThreadPool::serve() {
    uint64_t seen = 0;
    for (;;) {
        const Work* work;
        int64_t count;
        auto until = std::chrono::steady_clock::now() + PATIENCE;
        while (calls_ == seen && std::chrono::steady_clock::now() < until) pause();
        {
            std::unique_lock<std::mutex> lock(state_);
            wake_.wait(lock, [&] { return calls_ != seen; });
            seen = calls_;
            if (stopping_) return;
            if (!work_) continue;
            work = work_, count = count_;  // the members may be gone before the last item is
            ++inside_;
        }
        claim(*work, count);
        --inside_;
    }
}

}  // namespace quire
