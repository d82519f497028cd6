//! The kernels of a device by name, which are loaded once.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::driver::CudaFunction;
use candle_core::{CudaDevice, Result};

use super::launch::{Kernels, attention_shared_bytes};
use super::module::Module;

/// Declares the table of kernels from the sources and the names of their kernels.
macro_rules! functions {
    ($($source:ident: $($name:ident),+;)+) => {
        /// The kernels of one device.
        #[derive(Debug)]
        pub(super) struct Functions {
            $($(pub(super) $name: CudaFunction,)+)+
        }

        impl Functions {
            /// Loads all kernels.
            fn load(device: &CudaDevice) -> Result<Self> {
                $(
                    let image = include_bytes!(concat!(env!("OUT_DIR"), "/", stringify!($source), ".fatbin"));
                    let $source = Module::load(device, image)?;
                )+
                Ok(Self {
                    $($($name: $source.function(stringify!($name), shared_bytes(stringify!($name)))?,)+)+
                })
            }
        }
    };
}

functions! {
    embed: embed_norm_bf16_bf16, embed_norm_f16_bf16, embed_norm_f32_bf16, gather_rows_bf16;
    norm: rms_norm_f32, rms_norm_bf16, add_rms_norm_f32, add_rms_norm_bf16, add_rms_norm_delta_bf16,
        add_rms_norm_delta_wide_bf16;
    geglu: geglu_f32, geglu_bf16, geglu_delta_bf16;
    norm_rope: norm_rope_f32, norm_rope_bf16, norm_rope_delta_bf16;
    low_rank: low_rank_16, low_rank_32, low_rank_48, low_rank_64;
    training: training_adamw, training_add_at, training_add_norm, training_attention, training_attention_keys, training_attention_queries, training_copy, training_geglu, training_geglu_backward, training_norm_rope, training_norm_rope_backward, training_rms_norm, training_rms_norm_backward, training_scale_gradients, training_select, training_square_sums;
    loss: loss_add, loss_cap, loss_gradient_bf16, loss_gradient_f32, loss_split;
    attention: attention_f32, attention_bf16_32, attention_bf16_64, attention_bf16_128, attention_bf16_256;
    fp8: add_rms_norm_fp8, geglu_fp8, quantise_rows_fp8;
}

/// Returns the most dynamic shared memory that a kernel is launched with, in bytes, if that is more than every kernel
/// may have.
fn shared_bytes(name: &str) -> i32 {
    match name {
        "attention_bf16_256" => attention_shared_bytes(256) as i32,
        _ => 0,
    }
}

/// The kernels of every device that has been used.
static LOADED: LazyLock<Mutex<HashMap<DeviceId, Arc<Kernels>>>> = LazyLock::new(Mutex::default);

impl Kernels {
    /// Returns the kernels of a device, and loads them when it is first used.
    pub(in crate::model) fn of(device: &CudaDevice) -> Result<Arc<Self>> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = loaded.get(&device.id()) {
            return Ok(Arc::clone(kernels));
        }
        let kernels = Arc::new(Self::new(device, Functions::load(device)?));
        loaded.insert(device.id(), Arc::clone(&kernels));
        Ok(kernels)
    }
}
