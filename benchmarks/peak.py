"""The most multiply-adds of float32 that the processor does in a second, by a loop that touches registers only."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from scheduler.machine.processor import FLAGS

_LOOP = """
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kChains = 12;  // enough to hide the latency, and few enough for the registers
typedef float Vector __attribute__((vector_size(4 * kLanes)));

// By name, since an array would live in memory. Each step is done, and in this order.
#define EACH(DO) DO(a) DO(b) DO(c) DO(d) DO(e) DO(f) DO(g) DO(h) DO(i) DO(j) DO(k) DO(l)
#if defined(__AVX512F__)
#define STEP(sum) sum = sum * factor + addend; asm volatile("" : "+v"(sum));
#elif defined(__x86_64__)
#define STEP(sum) sum = sum * factor + addend; asm volatile("" : "+x"(sum));
#elif defined(__aarch64__)
#define STEP(sum) sum = sum * factor + addend; asm volatile("" : "+w"(sum));
#endif
#define DEFINE(sum) Vector sum = {};
#define ADD(sum) *sink += sum[0];

void run(long steps, float* sink) {
  const Vector factor = Vector{} + 0.5f, addend = Vector{} + 1.0f;
  EACH(DEFINE)
  for (long step = 0; step < steps; ++step) {
    EACH(STEP)
  }
  EACH(ADD)
}

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
  const long steps = 500'000;
  std::vector<float> sinks(threads * 16);
  double best = 0;
  for (int attempt = 0; attempt < 100; ++attempt) {
    std::vector<std::thread> team;
    const auto start = std::chrono::steady_clock::now();
    for (int thread = 0; thread < threads; ++thread) team.emplace_back(run, steps, &sinks[16 * thread]);
    for (std::thread& thread : team) thread.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const double rate = double(steps) * kChains * kLanes * threads / seconds;
    if (rate > best) best = rate;
  }
  std::printf("%g\\n", best);
}
"""

HOW = "12 chains of vector multiply-adds in registers, the best of 100 runs"


def peak(instructions: str, threads: int) -> float:
    """Multiply-adds per second with the instructions of one build."""
    with tempfile.TemporaryDirectory(prefix="carousel-peak-") as folder:
        source, program = Path(folder) / "peak.cpp", Path(folder) / "peak"
        source.write_text(_LOOP)
        compiler = os.environ.get("CXX", "c++")
        command = [
            compiler,
            "-O2",
            "-std=c++20",
            "-pthread",
            *FLAGS[instructions],
            "-o",
            str(program),
            str(source),
        ]
        subprocess.run(command, check=True)
        output = subprocess.run([str(program), str(threads)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output)
