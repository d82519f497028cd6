// What the emulated libraries of matrix products share.

#pragma once

#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

// Queues `run(argument)` through a function that only the emulated driver has, and deletes the argument after the last
// run: a graph may run it many times.
template <typename Argument>
int enqueue(void *stream, void (*run)(void *), Argument *argument) {
    using Enqueue = int (*)(void *, void (*)(void *), void *, void (*)(void *));
    static const Enqueue driver = (Enqueue)dlsym(dlopen("libcuda.so.1", RTLD_NOW), "emulated_enqueue");
    return driver(stream, run, argument, [](void *at) { delete (Argument *)at; });
}

// Rounds to bf16, to nearest even.
inline uint16_t bf16(float x) {
    uint32_t wide;
    memcpy(&wide, &x, 4);
    return (uint16_t)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}
