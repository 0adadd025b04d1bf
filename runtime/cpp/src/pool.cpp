#include "pool.hpp"

#include <algorithm>
#include <edgedistill/error.hpp>
#include <new>
#include <utility>

#ifdef __linux__
#include <pthread.h>
#endif

namespace edgedistill::detail {

namespace {

constexpr std::chrono::hours LONGEST_WAIT{24 * 365};  // a deadline further away could overflow the clock

void name_this_thread(std::size_t number) {
#ifdef __linux__
    pthread_setname_np(pthread_self(), ("edgedistill-" + std::to_string(number % 1000)).c_str());
#else
    static_cast<void>(number);
#endif
}

void set_name(std::string& name, const std::filesystem::path& path) {
#ifdef _WIN32
    name = path.u8string();
#else
    name.assign(path.native());  // into memory that is there
#endif
}

Error closed() {
    return {ErrorKind::closed, "the engine is closed; make a new one"};
}

// For callbacks, which nothing can be thrown at.
void mark_failed(Prediction& answer, const std::string& name, const std::exception_ptr& failure) noexcept {
    answer = Prediction();
    try {
        answer.name = name;
        std::rethrow_exception(failure);
    } catch (const std::exception& error) {
        try {
            answer.error = error.what();
        } catch (const std::bad_alloc&) {
            answer.error = "no memory";  // short: needs none
        }
    } catch (...) {
        answer.error = "unknown error";
    }
}

}  // namespace

Pool::Pool(PoolSettings settings)
    : capacity_(settings.capacity),
      batch_(settings.batch),
      policy_(settings.policy),
      callback_(std::move(settings.callback)) {}

Pool::~Pool() {
    close();
}

void Pool::start(std::vector<Make> makers) {
    // A full engine's producer sleeps until about half of the waiting images are begun, and then hands over several at
    // once: a switch of threads for each of them would cost a core that answers thousands of images a second.
    const std::size_t in_work = makers.size() * batch_;
    low_water_ = capacity_ > in_work ? (capacity_ - in_work) / 2 : 0;
    const std::lock_guard<std::mutex> closing(closing_);
    Lock lock(mutex_);
    starting_ = makers.size();
    lock.unlock();
    threads_.reserve(makers.size());
    for (auto& make : makers) {
        const std::size_t number = threads_.size();
        // The thread owns what it answers with, so close leaves nothing of it behind.
        threads_.emplace_back([this, number, make = std::move(make)]() mutable {
            name_this_thread(number);
            const Answer answer = made(make);
            make = nullptr;
            work(answer);
        });
    }
}

void Pool::wait_until_ready() {
    Lock lock(mutex_);
    ready_.wait(lock, [this] { return starting_ == 0 || failure_ || closed_; });
    if (failure_) std::rethrow_exception(failure_);
    if (closed_) throw closed();
}

// ---- workers ----

bool Pool::is_closed() {
    const Lock lock(mutex_);
    return closed_;
}

// A thread that cannot answer stays, and fails what it takes: nobody waits for an answer that never comes.
Pool::Answer Pool::made(const Make& make) {
    Answer answer;
    std::exception_ptr failure;
    try {
        if (!is_closed()) answer = make();
    } catch (...) {
        failure = std::current_exception();
        answer = [failure](const Frame* const*, std::size_t, Prediction*) { std::rethrow_exception(failure); };
    }
    Lock lock(mutex_);
    --starting_;
    if (failure && !failure_) failure_ = failure;
    lock.unlock();
    ready_.notify_all();
    if (failure) room_.notify_all();
    return answer;
}

void Pool::work(const Answer& answer) {
    std::vector<Slot*> slots(batch_);
    std::vector<const Frame*> frames(batch_);
    std::vector<Prediction> predictions(batch_);
    std::size_t count = 0;
    while ((count = trade(slots.data(), count)) > 0) {
        for (std::size_t i = 0; i < count; ++i) {
            frames[i] = &slots[i]->frame;
            std::swap(predictions[i], slots[i]->prediction);
        }
        std::exception_ptr failure;
        try {
            answer(frames.data(), count, predictions.data());
        } catch (...) {
            failure = std::current_exception();
            for (std::size_t i = 0; i < count; ++i) mark_failed(predictions[i], frames[i]->name, failure);
        }
        for (std::size_t i = 0; i < count; ++i) {
            std::swap(predictions[i], slots[i]->prediction);
            slots[i]->failure = failure;
            std::vector<std::uint8_t>().swap(slots[i]->owned);
            slots[i]->keep_alive.reset();
        }
    }
}

// Hands back `done` answered slots and takes new ones under the same lock; waits for one. 0 when the pool is closed.
std::size_t Pool::trade(Slot** slots, std::size_t done) {
    Lock lock(mutex_);
    Wake wake = settle(lock, slots, done);
    if (first_waiting_ == nullptr && !closed_) {
        if (wake.any()) {
            lock.unlock();
            notify(std::exchange(wake, {}));
            lock.lock();
        }
        ++idle_;
        work_.wait(lock, [this] { return first_waiting_ != nullptr || closed_; });
        --idle_;
    }
    std::size_t count = 0;
    while (!closed_ && count < batch_ && first_waiting_ != nullptr) {
        Slot* slot = first_waiting_;
        slot->state = State::working;
        first_waiting_ = slot->next;
        --waiting_;
        slots[count++] = slot;
    }
    wake.producer = wake.producer || producer_should_wake();
    lock.unlock();
    notify(wake);
    return count;
}

Pool::Wake Pool::settle(Lock& lock, Slot* const* slots, std::size_t done) {
    for (std::size_t i = 0; i < done; ++i) slots[i]->state = State::answered;
    Wake wake;
    if (callback_) {
        wake.producer = deliver(lock);
        wake.everybody = finished_ && held_ == 0;
    } else {
        wake.consumer = consumers_ > 0 && front_is_answered();
    }
    return wake;
}

// Calls back with what is answered at the front; one worker at a time does, for all. True: wake a producer.
bool Pool::deliver(Lock& lock) {
    bool wake_producer = false;
    if (delivering_) return wake_producer;
    delivering_ = true;
    while (front_is_answered()) {
        Slot& slot = *front_;
        unlink(slot);
        lock.unlock();
        if (std::exchange(wake_producer, false)) room_.notify_one();
        callback_(slot.prediction);
        lock.lock();
        put_back(slot);
        wake_producer = producer_should_wake();
    }
    delivering_ = false;
    return wake_producer;
}

void Pool::notify(const Wake& wake) {
    if (wake.worker) work_.notify_one();
    if (wake.producer) room_.notify_one();
    if (wake.everybody) {
        answers_.notify_all();
    } else if (wake.consumer) {
        answers_.notify_one();
    }
}

// ---- producers ----

bool Pool::submit(Submission& image, Engine::Timeout timeout) {
    Lock lock(mutex_);
    check_open();
    if (held_ >= capacity_ && policy_ == Policy::block && !wait_for_room(lock, timeout)) return false;
    check_open();
    Slot& slot = slot_for_next();
    // Swapped, so that the memory of the slot's last image goes with `image`, outside of the lock.
    slot.frame.data.swap(image.data);
    if (const auto* path = std::get_if<std::filesystem::path>(&slot.frame.data)) {
        set_name(slot.frame.name, *path);
    } else {
        slot.frame.name.swap(image.name);
    }
    slot.owned.swap(image.owned);
    slot.keep_alive.swap(image.keep_alive);
    slot.user = image.user;
    append(slot);
    Wake wake;
    wake.worker = idle_ > 0;
    wake.producer = producer_should_wake();  // whoever made room for several of them woke only one
    lock.unlock();
    notify(wake);
    return true;
}

void Pool::check_open() const {
    if (closed_) throw closed();
    if (finished_) throw Error(ErrorKind::closed, "submit after finish; make a new engine or call submit first");
    if (failure_) std::rethrow_exception(failure_);
}

bool Pool::wait_for_room(Lock& lock, const Engine::Timeout& timeout) {
    const auto ready = [this] { return held_ < capacity_ || closed_ || finished_ || failure_; };
    ++producers_;
    bool there = true;
    if (timeout) {
        const auto most = std::clamp<std::chrono::milliseconds>(*timeout, std::chrono::milliseconds(0), LONGEST_WAIT);
        there = room_.wait_until(lock, std::chrono::steady_clock::now() + most, ready);
    } else {
        room_.wait(lock, ready);
    }
    --producers_;
    return there;
}

// A slot in no list. When the pool is full, that of an image which is given up.
Pool::Slot& Pool::slot_for_next() {
    if (held_ >= capacity_) {
        Slot& slot = *victim();
        unlink(slot);
        put_back(slot);
        dropped_.fetch_add(1, std::memory_order_relaxed);
    }
    if (free_ == nullptr) {
        slots_.push_back(std::make_unique<Slot>());
        free_ = slots_.back().get();
    }
    return *free_;
}

// There is always one: more images are held than workers can have in hand.
Pool::Slot* Pool::victim() const {
    if (first_waiting_ != nullptr) return first_waiting_;
    Slot* slot = front_;
    while (slot->state != State::answered) slot = slot->next;
    return slot;
}

// ---- consumers ----

bool Pool::next(Prediction& out, std::uint64_t* user) {
    if (callback_)
        throw Error(ErrorKind::usage, "next: this engine hands its answers to a callback; use one of the two");
    Lock lock(mutex_);
    const auto ready = [this] { return closed_ || front_is_answered() || (finished_ && front_ == nullptr); };
    if (!ready()) {
        ++consumers_;
        answers_.wait(lock, ready);
        --consumers_;
    }
    if (closed_ || front_ == nullptr) return false;
    Slot& slot = *front_;
    unlink(slot);
    std::swap(out, slot.prediction);
    const std::exception_ptr failure = std::exchange(slot.failure, nullptr);
    if (user != nullptr) *user = slot.user;
    put_back(slot);
    Wake wake;
    wake.producer = producer_should_wake();
    wake.consumer = consumers_ > 0 && front_is_answered();
    wake.everybody = consumers_ > 0 && finished_ && front_ == nullptr;
    lock.unlock();
    notify(wake);
    if (failure) std::rethrow_exception(failure);
    return true;
}

void Pool::finish() {
    Lock lock(mutex_);
    finished_ = true;
    lock.unlock();
    room_.notify_all();
    answers_.notify_all();
    if (!callback_) return;
    lock.lock();
    answers_.wait(lock, [this] { return held_ == 0 || closed_; });
}

void Pool::close() noexcept {
    const std::lock_guard<std::mutex> closing(closing_);
    Lock lock(mutex_);
    closed_ = true;
    lock.unlock();
    work_.notify_all();
    room_.notify_all();
    answers_.notify_all();
    ready_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    // What waited is let go outside of the lock: keep_alive may run the caller's code.
    std::vector<std::unique_ptr<Slot>> abandoned;
    lock.lock();
    abandoned.swap(slots_);
    free_ = front_ = back_ = first_waiting_ = nullptr;
    held_ = waiting_ = 0;
    lock.unlock();
}

// ---- the list ----

// `slot` is the first of the free ones.
void Pool::append(Slot& slot) {
    free_ = slot.next;
    slot.state = State::waiting;
    slot.next = nullptr;
    slot.previous = back_;
    (back_ != nullptr ? back_->next : front_) = &slot;
    back_ = &slot;
    if (first_waiting_ == nullptr) first_waiting_ = &slot;
    ++waiting_;
    ++held_;
}

void Pool::unlink(Slot& slot) {
    if (slot.state == State::waiting) --waiting_;
    if (first_waiting_ == &slot) first_waiting_ = slot.next;
    (slot.previous != nullptr ? slot.previous->next : front_) = slot.next;
    (slot.next != nullptr ? slot.next->previous : back_) = slot.previous;
}

void Pool::put_back(Slot& slot) {
    slot.failure = nullptr;
    slot.previous = nullptr;
    slot.next = free_;
    free_ = &slot;
    --held_;
}

}  // namespace edgedistill::detail
