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
      batches_(std::move(settings.batches)),
      pixel_bytes_(settings.pixel_bytes),
      policy_(settings.policy),
      callback_(std::move(settings.callback)) {}

Pool::~Pool() {
    close();
}

void Pool::start(std::vector<Make> makers) {
    // A full engine's producer sleeps until about half of the waiting images are begun, and then hands over several at
    // once: a switch of threads for each of them would cost a core that answers thousands of images a second.
    const std::size_t in_work = makers.size() * batches_[0];
    low_water_ = capacity_ > in_work ? (capacity_ - in_work) / 2 : 0;
    // Enough is left to begin for all workers while the gathered ones are answered.
    patience_ = capacity_ - std::min(capacity_ / 2, 2 * in_work);
    // A worker begins images only while no stage has a full batch gathered, so that this is all that there can be.
    const std::size_t largest = *std::max_element(batches_.begin(), batches_.end());
    std::size_t most = makers.size() * largest;
    for (std::size_t stage = 1; stage < batches_.size(); ++stage) most += batches_[stage] - 1;
    gathered_for_.resize(batches_.size());
    if (batches_.size() > 1) {
        for (auto& gathered : gathered_for_) gathered.reserve(most);
        spare_.assign(most, std::vector<std::uint8_t>(pixel_bytes_));
    }
    const std::lock_guard<std::mutex> closing(closing_);
    Lock lock(mutex_);
    starting_ = makers.size();
    lock.unlock();
    threads_.reserve(makers.size());
    for (auto& make : makers) {
        const std::size_t number = threads_.size();
        // The thread owns what it answers with, so close leaves nothing of it behind.
        threads_.emplace_back([this, number, largest, make = std::move(make)]() mutable {
            name_this_thread(number);
            const Answer answer = made(make);
            make = nullptr;
            Hand hand;
            hand.slots.reserve(largest);
            hand.tasks.reserve(largest);
            while (trade(hand)) answer_all(answer, hand);
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
        answer = [failure](std::size_t, Task* const*, std::size_t) { std::rethrow_exception(failure); };
    }
    Lock lock(mutex_);
    --starting_;
    if (failure && !failure_) failure_ = failure;
    lock.unlock();
    ready_.notify_all();
    if (failure) room_.notify_all();
    return answer;
}

void Pool::answer_all(const Answer& answer, Hand& hand) {
    std::exception_ptr failure;
    try {
        answer(hand.stage, hand.tasks.data(), hand.tasks.size());
    } catch (...) {
        failure = std::current_exception();
        for (Slot* slot : hand.slots) {
            mark_failed(slot->prediction, slot->frame.name, failure);
            slot->task.passed_on = false;
        }
    }
    for (Slot* slot : hand.slots) {
        slot->failure = failure;
        if (slot->task.passed_on) continue;
        std::vector<std::uint8_t>().swap(slot->owned);
        slot->keep_alive.reset();
    }
}

// Hands back what is done and takes more under the same lock; waits for some. False when the pool is closed.
bool Pool::trade(Hand& hand) {
    Lock lock(mutex_);
    Wake wake = settle(lock, hand);
    if (!has_work() && !closed_) {
        if (wake.any()) {
            lock.unlock();
            notify(std::exchange(wake, {}));
            lock.lock();
        }
        ++idle_;
        work_.wait(lock, [this] { return has_work() || closed_; });
        --idle_;
    }
    take(hand);
    wake.worker = wake.worker || (idle_ > 0 && gathered_ > 0);
    wake.producer = wake.producer || producer_should_wake();
    lock.unlock();
    notify(wake);
    return !hand.slots.empty();
}

// Whose images are next, where there are any.
std::size_t Pool::next_stage() const {
    for (std::size_t stage = batches_.size(); --stage > 0;) {
        const auto& gathered = gathered_for_[stage];
        if (gathered.empty()) continue;
        if (gathered.size() >= batches_[stage] || begun_ - gathered.front()->number >= patience_) return stage;
    }
    std::size_t stage = 0;
    if (first_waiting_ != nullptr) return stage;
    while (gathered_for_[stage].empty()) ++stage;
    return stage;
}

void Pool::take(Hand& hand) {
    hand.slots.clear();
    hand.tasks.clear();
    if (closed_ || !has_work()) return;
    hand.stage = next_stage();
    if (hand.stage == 0) {
        while (hand.slots.size() < batches_[0] && first_waiting_ != nullptr) {
            hand.slots.push_back(first_waiting_);
            begin(*first_waiting_);
        }
    } else {
        auto& gathered = gathered_for_[hand.stage];
        const std::size_t count = std::min(gathered.size(), batches_[hand.stage]);
        const auto end = gathered.begin() + static_cast<std::ptrdiff_t>(count);
        hand.slots.assign(gathered.begin(), end);
        gathered.erase(gathered.begin(), end);
        gathered_ -= count;
    }
    for (Slot* slot : hand.slots) {
        slot->state = State::working;
        slot->task.passed_on = false;
        hand.tasks.push_back(&slot->task);
    }
}

// Takes the first one that waits out of those that do.
void Pool::begin(Slot& slot) {
    first_waiting_ = slot.next;
    --waiting_;
    slot.number = begun_++;
    if (spare_.empty()) return;
    slot.task.pixels.swap(spare_.back());
    spare_.pop_back();
}

void Pool::gather(std::size_t stage, Slot& slot) {
    slot.state = State::gathered;
    gathered_for_[stage].push_back(&slot);
    ++gathered_;
}

// Takes a gathered one out of those that are.
void Pool::forget(Slot& slot) {
    for (auto& gathered : gathered_for_) {
        const auto found = std::find(gathered.begin(), gathered.end(), &slot);
        if (found == gathered.end()) continue;
        gathered.erase(found);
        --gathered_;
        return;
    }
}

void Pool::give_back_pixels(Slot& slot) {
    if (slot.task.pixels.capacity() == 0) return;
    spare_.emplace_back().swap(slot.task.pixels);
}

Pool::Wake Pool::settle(Lock& lock, const Hand& hand) {
    for (Slot* slot : hand.slots) {
        if (slot->task.passed_on) {
            gather(hand.stage + 1, *slot);
        } else {
            slot->state = State::answered;
            give_back_pixels(*slot);
        }
    }
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
    std::swap(slot.user, image.user);
    append(slot);
    Wake wake;
    wake.worker = idle_ > 0;
    wake.producer = producer_should_wake();  // whoever made room for several of them woke only one
    // What was given up may have stood before an answer.
    wake.consumer = consumers_ > 0 && front_is_answered();
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

// A slot in no list. When the pool is full, that of an image which is given up, where there is one.
Pool::Slot& Pool::slot_for_next() {
    if (Slot* const slot = held_ >= capacity_ ? victim() : nullptr) {
        give_up(*slot);
        dropped_.fetch_add(1, std::memory_order_relaxed);
    }
    if (free_ == nullptr) {
        slots_.push_back(std::make_unique<Slot>());
        free_ = slots_.back().get();
        free_->task.frame = &free_->frame;
        free_->task.answer = &free_->prediction;
    }
    return *free_;
}

void Pool::give_up(Slot& slot) {
    if (slot.state == State::gathered) forget(slot);
    unlink(slot);
    put_back(slot);
}

void Pool::withdraw(std::uint64_t user) {
    // What keeps the caller's memory is let go outside of the lock.
    std::vector<std::uint8_t> owned;
    std::shared_ptr<const void> keep_alive;
    Lock lock(mutex_);
    Slot* slot = front_;
    while (slot != nullptr && (slot->user != user || slot->state == State::working)) slot = slot->next;
    if (slot == nullptr) return;
    owned.swap(slot->owned);
    keep_alive.swap(slot->keep_alive);
    give_up(*slot);
    Wake wake;
    wake.producer = producer_should_wake();
    wake.everybody = front_is_answered() || held_ == 0;
    lock.unlock();
    notify(wake);
}

// Null where workers have every image in hand.
Pool::Slot* Pool::victim() const {
    if (first_waiting_ != nullptr) return first_waiting_;
    Slot* slot = front_;
    while (slot != nullptr && slot->state == State::working) slot = slot->next;
    return slot;
}

// ---- consumers ----

bool Pool::next(Prediction& out, std::uint64_t* user, const Deadline* deadline) {
    if (callback_)
        throw Error(ErrorKind::usage, "next: this engine hands its answers to a callback; use one of the two");
    Lock lock(mutex_);
    const auto ready = [this] { return closed_ || front_is_answered() || (finished_ && front_ == nullptr); };
    if (!ready()) {
        ++consumers_;
        bool in_time = true;
        if (deadline != nullptr) {
            in_time = answers_.wait_until(lock, *deadline, ready);
        } else {
            answers_.wait(lock, ready);
        }
        --consumers_;
        if (!in_time) return false;
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
    for (auto& gathered : gathered_for_) gathered.clear();
    held_ = waiting_ = gathered_ = 0;
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
    give_back_pixels(slot);
    slot.failure = nullptr;
    slot.previous = nullptr;
    slot.next = free_;
    free_ = &slot;
    --held_;
}

}  // namespace edgedistill::detail
