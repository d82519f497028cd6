// Registers our kernels, built from their real sources. Every thread of a block runs as a fiber.

#include <cuda_fp16.h>
#include <cuda_fp8.h>

// Headers that several kernels include must not become part of the namespace of one of them.
#include "delta.cuh"
#include "rows.cuh"

#include "kernels.h"

namespace embed_cu {
#include "embed.cu"
}

namespace geglu_cu {
#include "geglu.cu"
}
namespace norm_cu {
#include "norm.cu"
}
namespace norm_rope_cu {
#include "norm_rope.cu"
}
namespace low_rank_cu {
#include "low_rank.cu"
}
namespace attention_cu {
#include "attention.cu"
}
namespace fp8_cu {
#include "fp8.cu"
}
namespace training_cu {
#include "training.cu"
}
namespace loss_cu {
#include "loss.cu"
}

template <typename... Arguments>
static void add_kernel(const char *name, void (*kernel)(Arguments...)) {
    kernels()[name] = [kernel](void **parameters) -> Run {
        const auto arguments = copied<Arguments...>(parameters, std::index_sequence_for<Arguments...>());
        return [kernel, arguments](Grid grid) {
            const auto run = [&] { std::apply(kernel, arguments); };
            emulation::launch({grid.x, grid.y}, grid.threads, run, grid.shared_bytes);
        };
    };
}

void add_our_kernels() {
    using namespace embed_cu;
    using namespace geglu_cu;
    using namespace norm_cu;
    using namespace norm_rope_cu;
    using namespace low_rank_cu;
    using namespace attention_cu;
    using namespace fp8_cu;
    using namespace training_cu;
    using namespace loss_cu;
#define ADD(name) add_kernel(#name, name);
    ADD(embed_norm_bf16_bf16) ADD(embed_norm_f16_bf16) ADD(embed_norm_f32_bf16)
    ADD(embed_norm_bf16_f32) ADD(embed_norm_f16_f32) ADD(embed_norm_f32_f32)
    ADD(gather_rows_f32) ADD(gather_rows_bf16)
    ADD(geglu_f32) ADD(geglu_bf16) ADD(geglu_delta_bf16)
    ADD(rms_norm_f32) ADD(rms_norm_bf16) ADD(add_rms_norm_f32) ADD(add_rms_norm_bf16)
    ADD(add_rms_norm_delta_bf16) ADD(add_rms_norm_delta_wide_bf16)
    ADD(norm_rope_f32) ADD(norm_rope_bf16) ADD(norm_rope_delta_bf16)
    ADD(low_rank_16) ADD(low_rank_32) ADD(low_rank_48) ADD(low_rank_64)
    ADD(attention_f32)
    ADD(training_copy) ADD(training_rms_norm) ADD(training_add_norm) ADD(training_rms_norm_backward)
    ADD(training_geglu) ADD(training_geglu_backward) ADD(training_norm_rope) ADD(training_norm_rope_backward)
    ADD(training_attention) ADD(training_attention_queries) ADD(training_attention_keys)
    ADD(training_select) ADD(training_add_at)
    ADD(training_square_sums) ADD(training_scale_gradients) ADD(training_adamw)
    ADD(loss_split) ADD(loss_cap) ADD(loss_gradient_f32) ADD(loss_gradient_bf16) ADD(loss_add)
    ADD(attention_bf16_32) ADD(attention_bf16_64) ADD(attention_bf16_128) ADD(attention_bf16_256)
    ADD(add_rms_norm_fp8) ADD(geglu_fp8) ADD(quantise_rows_fp8)
}
