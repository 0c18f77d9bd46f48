// A small pool of threads that share the items of one call at a time.
//
// Items are claimed one by one, so a core that a neighbour slows down simply does fewer. A call waits
// only for threads that have claimed an item: one that is asleep or descheduled is not waited for.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace quire {

class ThreadPool {
public:
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int threads() const { return int(workers_.size()) + 1; }

    using Work = std::function<void(int64_t)>;

    // Calls work(i) once for every i in [0, count), on this thread and the others.
    void run(int64_t count, const Work& work);

private:
    void serve();
    void claim(const Work& work, int64_t count);

    std::vector<std::thread> workers_;
    std::mutex call_;   // one call at a time
    std::mutex state_;  // guards what follows, but for the atomics
    std::condition_variable wake_;
    const Work* work_ = nullptr;
    int64_t count_ = 0;
    bool stopping_ = false;
    std::atomic<int64_t> next_{0};
    std::atomic<uint64_t> calls_{0};
    std::atomic<int> inside_{0};
};

}  // namespace quire
