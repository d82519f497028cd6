// Registers our kernels, built from their real sources. Every thread of a block runs as a fiber.

#include "common.cuh"

#include "kernels.h"

namespace geglu_cu {
#include "geglu.cu"
}
namespace norm_cu {
#include "norm.cu"
}
namespace norm_rope_cu {
#include "norm_rope.cu"
}
namespace attention_cu {
#include "attention.cu"
}

template <typename... Arguments>
static void add_kernel(const char *name, void (*kernel)(Arguments...)) {
    kernels()[name] = [kernel](void **parameters) -> Run {
        const auto arguments = copied<Arguments...>(parameters, std::index_sequence_for<Arguments...>());
        return [kernel, arguments](Grid grid) {
            emulation::launch({grid.x, grid.y}, grid.threads, [&] { std::apply(kernel, arguments); });
        };
    };
}

void add_our_kernels() {
    using namespace geglu_cu;
    using namespace norm_cu;
    using namespace norm_rope_cu;
    using namespace attention_cu;
#define ADD(name) add_kernel(#name, name);
    ADD(geglu_f32) ADD(geglu_bf16)
    ADD(rms_norm_f32) ADD(rms_norm_bf16) ADD(add_rms_norm_f32) ADD(add_rms_norm_bf16)
    ADD(norm_rope_f32) ADD(norm_rope_bf16)
    ADD(attention_f32)
    ADD(attention_bf16_32) ADD(attention_bf16_64) ADD(attention_bf16_128) ADD(attention_bf16_256)
}
