//! Compares every kernel with the same operation on the CPU, on random inputs. These tests need a GPU.

use std::sync::LazyLock;

use candle_core::{DType, Device, Result, Tensor};

use super::super::tests::random;
use super::super::{
    CachedKeysValues, PackedAttention, RopeAngles, Span, Spans, add_rms_norm, geglu, norm_rope, rms_norm,
};
use super::fp8::{Fp8Products, Fp8Weight};
use super::launch::{Fp8Rows, Kernels};
use crate::model::transfer::cuda_tensor::CudaTensor;

/// Both dtypes, and how far a result of order one may differ from the CPU's f32 result.
const DTYPES: [(DType, f32); 2] = [(DType::F32, 2e-5), (DType::BF16, 2e-2)];

/// Returns the device that all tests share, because each new device compiles the kernels again.
fn gpu() -> Device {
    static GPU: LazyLock<Device> = LazyLock::new(|| Device::new_cuda(0).expect("these tests need a GPU"));
    GPU.clone()
}

/// Returns `x` rounded to `dtype`, on the GPU in that dtype and on the CPU in f32. Both hold the same numbers, so that
/// only the kernels can cause a difference.
fn both(x: &Tensor, dtype: DType) -> Result<(Tensor, Tensor)> {
    let x = x.to_dtype(dtype)?;
    Ok((x.to_device(&gpu())?, x.to_dtype(DType::F32)?))
}

/// Panics unless the results differ by at most `tolerance`, relative to the largest expected value if that exceeds one.
fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f32) -> Result<()> {
    let found = found.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    let scale = expected.abs()?.max_all()?.to_scalar::<f32>()?.max(1.0);
    let error = (found - expected)?.abs()?.max_all()?.to_scalar::<f32>()? / scale;
    assert!(
        error <= tolerance,
        "{what}: differs by {error}, expected at most {tolerance}"
    );
    Ok(())
}

#[test]
fn geglu_equals_the_cpu() -> Result<()> {
    for (dtype, tolerance) in DTYPES {
        let (gate, cpu_gate) = both(&(random((33, 704), 1)? * 4.0)?, dtype)?;
        let (up, cpu_up) = both(&random((33, 704), 2)?, dtype)?;
        assert_close("geglu", &geglu(&gate, &up)?, &geglu(&cpu_gate, &cpu_up)?, tolerance)?;
    }
    Ok(())
}

#[test]
fn norms_equal_the_cpu() -> Result<()> {
    for (dtype, tolerance) in DTYPES {
        for width in [64, 640, 2048, 2304] {
            let (residual, cpu_residual) = both(&random((19, width), 1)?, DType::F32)?;
            let (next, cpu_next) = both(&random(width, 2)?, DType::F32)?;
            let (post, cpu_post) = both(&random(width, 3)?, DType::F32)?;
            let (y, cpu_y) = both(&random((19, width), 4)?, dtype)?;
            let found = rms_norm(&residual, &next, 1e-6, dtype)?;
            assert_eq!(found.dtype(), dtype);
            let expected = rms_norm(&cpu_residual, &cpu_next, 1e-6, DType::F32)?;
            assert_close("rms-norm", &found, &expected, tolerance)?;
            for (post, cpu_post) in [(None, None), (Some(&post), Some(&cpu_post))] {
                let (sum, normed) = add_rms_norm(&residual, &y, post, &next, 1e-6)?;
                let expected = add_rms_norm(&cpu_residual, &cpu_y, cpu_post, &cpu_next, 1e-6)?;
                assert_close("sum", &sum, &expected.0, 2e-5)?;
                assert_close("normed sum", &normed, &expected.1, tolerance)?;
            }
        }
    }
    Ok(())
}

#[test]
fn norm_rope_equals_the_cpu() -> Result<()> {
    let positions = [7u32, 0, 39, 12, 7];
    for (dtype, tolerance) in DTYPES {
        for (heads, head_dim) in [(1, 32), (4, 64), (8, 256)] {
            let (x, cpu_x) = both(&random((positions.len(), heads * head_dim), 1)?, dtype)?;
            let tables = (random((40, head_dim / 2), 2)?, random((40, head_dim / 2), 3)?);
            let (weight, cpu_weight) = both(&random(head_dim, 4)?, DType::F32)?;
            let gpu_angles = RopeAngles {
                cos: tables.0.to_device(&gpu())?,
                sin: tables.1.to_device(&gpu())?,
                positions: Some(Tensor::new(&positions, &gpu())?),
            };
            let table_on_cpu = RopeAngles {
                cos: tables.0.clone(),
                sin: tables.1.clone(),
                positions: Some(Tensor::new(&positions, &Device::Cpu)?),
            };
            let (cos, sin) = table_on_cpu.of_tokens()?;
            let cpu_angles = RopeAngles {
                cos,
                sin,
                positions: None,
            };
            for (norm, cpu_norm) in [(None, None), (Some((&weight, 1e-6)), Some((&cpu_weight, 1e-6)))] {
                let found = norm_rope(&x, &gpu_angles, norm)?;
                assert_close(
                    "norm-rope",
                    &found,
                    &norm_rope(&cpu_x, &cpu_angles, cpu_norm)?,
                    tolerance,
                )?;
            }
        }
    }
    Ok(())
}

#[test]
fn attention_equals_the_cpu() -> Result<()> {
    let lengths = [(9, 24), (1, 23), (40, 24), (17, 0), (150, 11)];
    for (dtype, tolerance) in DTYPES {
        for (heads, kv_heads, head_dim, window, softcap) in [
            (4, 1, 256, None, None),
            (8, 4, 256, Some(33), Some(50.0)),
            (8, 1, 64, Some(20), None),
            (4, 4, 128, None, Some(5.0)),
            (4, 2, 32, None, None),
        ] {
            for last_only in [false, true] {
                let (mut list, mut query_start, mut key_start) = (Vec::new(), 0, 0);
                for (keys, shared) in lengths {
                    let queries = if last_only { 1 } else { keys };
                    list.push(Span {
                        query_start,
                        queries,
                        key_start,
                        keys,
                        shared,
                    });
                    query_start += queries;
                    key_start += keys;
                }
                let tensor = |rows: usize, heads: usize, seed| both(&random((rows, heads * head_dim), seed)?, dtype);
                let (q, cpu_q) = tensor(query_start, heads, 1)?;
                let (k, cpu_k) = tensor(key_start, kv_heads, 2)?;
                let (v, cpu_v) = tensor(key_start, kv_heads, 3)?;
                let (prefix_k, cpu_prefix_k) = tensor(24, kv_heads, 4)?;
                let (prefix_v, cpu_prefix_v) = tensor(24, kv_heads, 5)?;
                let run = |q: &Tensor, k: &Tensor, v: &Tensor, keys: &Tensor, values: &Tensor| {
                    let prefix = CachedKeysValues {
                        keys: keys.clone(),
                        values: values.clone(),
                    };
                    let op = PackedAttention {
                        spans: &Spans::new(list.clone(), q.device())?,
                        prefix: Some(&prefix),
                        heads,
                        kv_heads,
                        head_dim,
                        scale: 2.0 * (head_dim as f64).powf(-0.5),
                        softcap,
                        window,
                    };
                    op.forward(q, k, v)
                };
                let found = run(&q, &k, &v, &prefix_k, &prefix_v)?;
                let expected = run(&cpu_q, &cpu_k, &cpu_v, &cpu_prefix_k, &cpu_prefix_v)?;
                assert_close("attention", &found, &expected, tolerance)?;
            }
        }
    }
    Ok(())
}

/// The rows of both factors differ in size by orders of magnitude, so a scale that is missing, or that of another row,
/// changes a result by far more than rounding to e4m3 does.
#[test]
fn products_in_fp8_equal_the_cpu() -> Result<()> {
    let device = gpu();
    let device = device.as_cuda_device()?;
    let products = Fp8Products::new(device)?;
    let sizes = |count: usize| {
        let sizes: Vec<f32> = (0..count).map(|row| 10f32.powi(row as i32 % 5 - 2)).collect();
        Tensor::from_vec(sizes, (count, 1), &Device::Cpu)
    };
    // One row, and rows that are padded.
    for (rows, inputs, outputs) in [(1, 64, 48), (19, 640, 256)] {
        let (x, cpu_x) = both(&random((rows, inputs), 1)?.broadcast_mul(&sizes(rows)?)?, DType::BF16)?;
        let (weight, cpu_weight) = both(
            &random((outputs, inputs), 2)?.broadcast_mul(&sizes(outputs)?)?,
            DType::BF16,
        )?;
        let padded = Fp8Products::padded(rows);
        let codes = Tensor::zeros((padded, inputs.div_ceil(4)), DType::U32, &gpu())?;
        let scales = Tensor::zeros(padded, DType::F32, &gpu())?;
        let out = Tensor::zeros((padded, outputs), DType::BF16, &gpu())?;
        let address = |tensor: &Tensor| CudaTensor::new("fp8", tensor)?.address();
        let quantised = Fp8Rows {
            codes: address(&codes)?,
            scales: address(&scales)?,
        };
        Kernels::of(device)?.quantise_rows_fp8(address(&x)?, rows, inputs, quantised)?;
        let weight = Fp8Weight::new(device, address(&weight)?, outputs, inputs)?;
        products.multiply(&device.cuda_stream(), rows, quantised, &weight, address(&out)?)?;

        let found = out.narrow(0, 0, rows)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        let expected = cpu_x.matmul(&cpu_weight.t()?)?;
        let sizes = sizes(rows)?.matmul(&sizes(outputs)?.t()?)?;
        // A factor is wrong by 1/16 at most and by about 1/40 on average, at random.
        let allowed = 0.08 * (inputs as f32).sqrt();
        let error = ((found - expected)? / sizes)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(error > 0.0 && error <= allowed, "{error}, expected at most {allowed}");
    }
    Ok(())
}
