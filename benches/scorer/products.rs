//! The rates of matrix products on this machine, with the weights packed in advance where a library can do that.

use std::mem::MaybeUninit;
use std::time::Instant;

use candle_core::{Device, Tensor};
use rten_gemm::{GemmExecutor, GemmInputA, GemmInputB, GemmUninitOptions};
use rten_tensor::NdTensorView;

use crate::support::median;

/// The shapes of products: rows, inputs and outputs.
const SHAPES: [(usize, usize, usize); 3] = [(512, 640, 2048), (512, 2048, 640), (512, 2048, 2048)];

/// Returns the highest rate over all shapes, in operations per second; `product` prepares a product of a shape.
fn highest<P: FnMut()>(product: impl Fn(usize, usize, usize) -> P) -> f64 {
    let rate = |(rows, inputs, outputs): (usize, usize, usize)| {
        let mut product = product(rows, inputs, outputs);
        product();
        let times = (0..9).map(|_| {
            let start = Instant::now();
            product();
            start.elapsed().as_secs_f64()
        });
        (2 * rows * inputs * outputs) as f64 / median(times.collect())
    };
    SHAPES.into_iter().map(rate).fold(0.0, f64::max)
}

/// Returns the rate of candle's f32 product.
pub fn candle_f32() -> f64 {
    highest(|rows, inputs, outputs| {
        let x = Tensor::rand(-1f32, 1f32, (rows, inputs), &Device::Cpu).unwrap();
        let weight = Tensor::rand(-1f32, 1f32, (outputs, inputs), &Device::Cpu).unwrap();
        move || drop(x.matmul(&weight.t().unwrap()).unwrap())
    })
}

/// Returns the rate of `rten-gemm` in f32.
pub fn packed_f32() -> f64 {
    highest(|rows, inputs, outputs| {
        let executor: GemmExecutor<f32, f32, f32> = GemmExecutor::new();
        let x: Vec<f32> = (0..rows * inputs).map(|index| (index % 17) as f32).collect();
        let weight: Vec<f32> = (0..outputs * inputs).map(|index| (index % 13) as f32).collect();
        let weight = executor.prepack_b(NdTensorView::from_data([outputs, inputs], &weight[..]).transposed());
        let mut out = vec![MaybeUninit::new(0f32); rows * outputs];
        move || {
            let x = GemmInputA::Unpacked(NdTensorView::from_data([rows, inputs], &x[..]));
            let weight = GemmInputB::Packed(&weight);
            executor
                .gemm_uninit(&mut out, x, weight, GemmUninitOptions::default())
                .unwrap();
        }
    })
}

/// Returns the rate of `rten-gemm` in 8-bit integers.
pub fn packed_int8() -> f64 {
    highest(|rows, inputs, outputs| {
        let executor: GemmExecutor<u8, i8, i32> = GemmExecutor::new();
        let x: Vec<u8> = (0..rows * inputs).map(|index| (index % 251) as u8).collect();
        let weight: Vec<i8> = (0..outputs * inputs).map(|index| (index % 127) as i8).collect();
        let weight = executor.prepack_b(NdTensorView::from_data([outputs, inputs], &weight[..]).transposed());
        let mut out = vec![MaybeUninit::new(0i32); rows * outputs];
        move || {
            let x = GemmInputA::Unpacked(NdTensorView::from_data([rows, inputs], &x[..]));
            let weight = GemmInputB::Packed(&weight);
            executor
                .gemm_uninit(&mut out, x, weight, GemmUninitOptions::default())
                .unwrap();
        }
    })
}
