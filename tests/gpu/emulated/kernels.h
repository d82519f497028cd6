// The table through which the emulated driver finds a kernel by its name and binds it to the arguments of a launch.

#pragma once

#include <stdint.h>

#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>

struct Grid {
    uint32_t x, y, threads;
    // Bytes of dynamic shared memory of each block.
    uint32_t shared_bytes;
};

using Run = std::function<void(Grid)>;
// Copies the arguments that `parameters` points to, as a launch does, and returns a function that runs the kernel with
// them.
using Bind = std::function<Run(void **parameters)>;

std::map<std::string, Bind> &kernels();

template <typename... Arguments, size_t... Index>
std::tuple<Arguments...> copied(void **parameters, std::index_sequence<Index...>) {
    return {*(Arguments *)parameters[Index]...};
}

// Registers a kernel that takes the grid as its first argument and computes all of it in one call.
template <typename... Arguments>
void add(const std::string &name, void (*kernel)(Grid, Arguments...)) {
    kernels()[name] = [kernel](void **parameters) -> Run {
        const auto arguments = copied<Arguments...>(parameters, std::index_sequence_for<Arguments...>());
        return [kernel, arguments](Grid grid) {
            std::apply(kernel, std::tuple_cat(std::make_tuple(grid), arguments));
        };
    };
}
