// The measuring loop inside every C++ candidate's process: JSON lines in, slices of time out.
//
// The C++ form of benchmarks/serve.py: the same requests, answers, warm-up and pre-roll, so that bench-fps measures
// candidates of both languages in the same rounds. Between two requests the process waits and burns nothing; how much
// it did burn is reported.
#pragma once

#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace edgedistill::programs {

using Json = nlohmann::ordered_json;  // what is written keeps its order
using Clock = std::chrono::steady_clock;

constexpr double kWarmUpSeconds = 0.3;
constexpr int kWarmUpSteps = 10;
// Before each slice the caches hold another candidate's data: a short run that is not counted.
constexpr double kPreRollShare = 0.05;

// One candidate in one scope on one input; exactly one of `step` and `run` is set. `step` answers one image (latency).
// `run(seconds)` keeps the machine busy for about that long and returns the images answered (throughput). `answer`: the
// class probabilities of the first image where they are at hand.
struct Case {
    std::function<void()> step;
    std::function<std::int64_t(double)> run;
    std::string precision = "f32";
    Json settings = Json::object();
    std::vector<float> answer;
};

// `latency_us`: one per image, empty for throughput.
struct Slice {
    std::int64_t count = 0;
    double seconds = 0.0;
    std::vector<double> latency_us;
};

inline double seconds_between(Clock::time_point start, Clock::time_point end) {
    return std::chrono::duration<double>(end - start).count();
}

inline Clock::time_point deadline_in(double seconds) {
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// `count` images one after the other.
inline Slice measure_count(const Case& one, std::int64_t count) {
    if (!one.step) {
        throw std::invalid_argument("only single images can be counted off, ask for mode latency");
    }
    Slice slice;
    slice.latency_us.reserve(static_cast<std::size_t>(count));
    const Clock::time_point start = Clock::now();
    Clock::time_point before = start;
    for (; slice.count < count; ++slice.count) {
        one.step();
        const Clock::time_point after = Clock::now();
        slice.latency_us.push_back(seconds_between(before, after) * 1e6);
        before = after;
    }
    slice.seconds = seconds_between(start, before);
    return slice;
}

// One slice. The loop ends with the first answer after `seconds`, and the time counts to it.
inline Slice measure(const Case& one, double seconds) {
    Slice slice;
    const Clock::time_point start = Clock::now();
    if (one.run) {
        slice.count = one.run(seconds);
        slice.seconds = seconds_between(start, Clock::now());
        return slice;
    }
    const Clock::time_point deadline =
        start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    Clock::time_point before = start;
    while (before < deadline) {
        one.step();
        const Clock::time_point after = Clock::now();
        slice.latency_us.push_back(seconds_between(before, after) * 1e6);
        before = after;
    }
    slice.count = static_cast<std::int64_t>(slice.latency_us.size());
    slice.seconds = seconds_between(start, before);
    return slice;
}

// Fills caches, lets libraries allocate and the clock rise; never counted.
inline void warm_up(const Case& one) {
    for (int number = 0; one.step && number < kWarmUpSteps; ++number) {
        one.step();
    }
    measure(one, kWarmUpSeconds);
}

// A thread for each step, over and over until the time is up, at least once; returns the steps done. What a step throws
// is thrown here.
inline std::function<std::int64_t(double)> side_by_side(std::vector<std::function<void()>> steps) {
    return [steps = std::move(steps)](double seconds) {
        const Clock::time_point deadline = deadline_in(seconds);
        std::vector<std::int64_t> counts(steps.size(), 0);
        std::vector<std::exception_ptr> faults(steps.size());
        std::vector<std::thread> threads;
        for (std::size_t number = 0; number < steps.size(); ++number) {
            threads.emplace_back([&, number] {
                try {
                    std::int64_t count = 0;
                    do {
                        steps[number]();
                        ++count;
                    } while (Clock::now() < deadline);
                    counts[number] = count;
                } catch (...) {
                    faults[number] = std::current_exception();
                }
            });
        }
        std::int64_t total = 0;
        for (std::size_t number = 0; number < steps.size(); ++number) {
            threads[number].join();
            total += counts[number];
        }
        for (const std::exception_ptr& fault : faults) {
            if (fault) {
                std::rethrow_exception(fault);
            }
        }
        return total;
    };
}

inline double process_seconds() {
    timespec spent{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
    return static_cast<double>(spent.tv_sec) + static_cast<double>(spent.tv_nsec) * 1e-9;
}

using Prepare = std::function<Case(const Json&)>;

inline Json handle(const Json& request, std::map<std::string, Case>& cases, const Prepare& prepare) {
    const std::string key = request.at("case");
    if (request.at("do") == "prepare") {
        cases[key] = prepare(request);
        const Case& one = cases[key];
        warm_up(one);
        return {{"precision", one.precision}, {"settings", one.settings}, {"answer", one.answer}};
    }
    const double seconds = request.at("seconds");
    const std::int64_t count = request.value("count", std::int64_t{0});
    const Case& one = cases.at(key);
    measure(one, kPreRollShare * seconds);
    const Slice slice = count > 0 ? measure_count(one, count) : measure(one, seconds);
    std::vector<double> latency_us;
    latency_us.reserve(slice.latency_us.size());
    for (const double value : slice.latency_us) {
        latency_us.push_back(std::round(value * 10) / 10);
    }
    return {{"count", slice.count}, {"seconds", slice.seconds}, {"latency_us", std::move(latency_us)}};
}

// Answers requests until standard input ends: {"do": "prepare", "case": KEY, ...}, {"do": "run", "case": KEY,
// "seconds": S}, with "count": N for so many images instead of so long. The answers go to what was standard output at
// the start; from then on prints of libraries land on standard error.
inline int serve(const Prepare& prepare) {
    std::FILE* channel = ::fdopen(::dup(STDOUT_FILENO), "w");
    if (channel == nullptr || ::dup2(STDERR_FILENO, STDOUT_FILENO) < 0) {
        throw std::runtime_error("standard output cannot be used");
    }
    std::map<std::string, Case> cases;
    Clock::time_point idle_since = Clock::now();
    double idle_cpu_since = process_seconds();
    for (std::string line; std::getline(std::cin, line);) {
        const double idle_s = seconds_between(idle_since, Clock::now());
        const double idle_cpu_s = process_seconds() - idle_cpu_since;
        Json reply;
        try {
            reply = handle(Json::parse(line), cases, prepare);
        } catch (const std::exception& error) {  // the parent turns it into a row 'not measured: reason'
            reply = {{"error", error.what()}};
        }
        reply["idle_s"] = idle_s;
        reply["idle_cpu_s"] = idle_cpu_s;
        const std::string text = reply.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
        std::fwrite(text.data(), 1, text.size(), channel);
        std::fflush(channel);
        idle_since = Clock::now();
        idle_cpu_since = process_seconds();
    }
    std::fclose(channel);
    return 0;
}

}  // namespace edgedistill::programs
