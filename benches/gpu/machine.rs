//! Measures the peak rates of the device with a plain matrix product and a plain copy.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use moderatord::model::device::Placement;

pub struct Rates {
    /// FLOPs per second of a square matrix product in the dtype of the model.
    pub matmul: f64,
    /// Bytes read and written per second by a copy within the device.
    pub copy: f64,
}

pub fn measure(placement: &Placement, seconds: f64) -> Rates {
    let size = if placement.device.is_cpu() { 1024 } else { 8192 };
    let square = || {
        let x = Tensor::randn(0f32, 1.0, (size, size), &placement.device).unwrap();
        x.to_dtype(placement.dtype).unwrap()
    };
    let (a, b) = (square(), square());
    let mut multiply = || drop(a.matmul(&b).unwrap());
    // A card that was idle is faster for the first half second, until it reaches its power limit.
    per_second(&placement.device, seconds, &mut multiply);
    let product = per_second(&placement.device, seconds, multiply);
    let bytes = if placement.device.is_cpu() {
        1usize << 26
    } else {
        1 << 30
    };
    let x = Tensor::zeros(bytes / 4, DType::F32, &placement.device).unwrap();
    let copies = per_second(&placement.device, seconds / 2.0, || drop(x.copy().unwrap()));
    Rates {
        matmul: product * 2.0 * (size as f64).powi(3),
        copy: copies * 2.0 * bytes as f64,
    }
}

/// Returns how often per second `run` can be executed. As in the daemon, launches overlap.
pub fn per_second(device: &Device, seconds: f64, mut run: impl FnMut()) -> f64 {
    run();
    device.synchronize().unwrap();
    let (start, mut runs) = (Instant::now(), 0u32);
    while start.elapsed().as_secs_f64() < seconds || runs < 3 {
        for _ in 0..3 {
            run();
        }
        // Waits after every three runs, so that the queue of launches stays short compared with the measured time.
        device.synchronize().unwrap();
        runs += 3;
    }
    f64::from(runs) / start.elapsed().as_secs_f64()
}
