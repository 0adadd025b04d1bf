#include "desk.hpp"

#include <utility>

#include <edgedistill/error.hpp>

namespace edgedistill::python {

using detail::Submission;

std::optional<Submitted> Desk::submit(Submission& image, Deadline deadline) {
    Lock lock(mutex_);
    std::uint64_t dropped_before = 0;
    const auto handed_over = [&] {
        dropped_before = pool_->dropped();
        image.user = next_number_;
        return pool_->submit(image, Engine::Timeout(0));
    };
    while (!handed_over()) {
        if (!wait_for_news(lock, deadline)) return std::nullopt;
    }
    Submitted submitted{next_number_++, {}};
    images_.try_emplace(submitted.number);
    if (pool_->dropped() != dropped_before) {
        submitted.dropped = image.user;
        images_.erase(image.user);
        changed_.notify_all();
    }
    return submitted;
}

std::optional<Prediction> Desk::take(std::uint64_t number, Deadline deadline) {
    Lock lock(mutex_);
    for (;;) {
        if (closed_) throw Error(ErrorKind::closed, "the engine is closed; make a new one");
        const auto found = images_.find(number);
        if (found == images_.end()) throw Error(ErrorKind::closed, "this image was given up, or its answer taken");
        if (found->second.answered) {
            Image image = std::move(found->second);
            images_.erase(found);
            lock.unlock();
            if (image.failure) std::rethrow_exception(image.failure);
            return std::move(image.prediction);
        }
        if (!wait_for_news(lock, deadline)) return std::nullopt;
    }
}

void Desk::forget(std::uint64_t number) {
    const Lock lock(mutex_);
    images_.erase(number);
    pool_->withdraw(number);
}

void Desk::close() {
    Lock lock(mutex_);
    closed_ = true;
    lock.unlock();
    pool_->close();
    changed_.notify_all();
}

// Takes an answer out of the pool, or waits for whoever does. False: nothing came until the deadline.
bool Desk::wait_for_news(Lock& lock, Deadline deadline) {
    if (taking_) return changed_.wait_until(lock, deadline) == std::cv_status::no_timeout;
    taking_ = true;
    lock.unlock();
    Image image;
    std::uint64_t number = 0;
    try {
        image.answered = pool_->next(image.prediction, &number, &deadline);
    } catch (...) {
        image.answered = true;
        image.failure = std::current_exception();
    }
    lock.lock();
    taking_ = false;
    changed_.notify_all();
    if (!image.answered) return closed_;
    const auto found = images_.find(number);
    if (found != images_.end()) found->second = std::move(image);
    return true;
}

}  // namespace edgedistill::python
