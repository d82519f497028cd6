//! Inner loops that the compiler vectorises for the instruction set that [`dispatch`] selects.
//!
//! The binary is built for baseline x86-64, and pulp selects AVX2 or AVX-512 at run time. The functions of this module
//! are inlined into the dispatched closure, where a multiply-add is a single instruction.

/// Runs `work`, compiled for the best instruction set that this machine supports.
pub fn dispatch<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// Number of independent partial sums: four 512-bit accumulators, which is enough to hide the latency of a
/// multiply-add.
const LANES: usize = 64;

/// Returns the inner product of `x` and `y`, which have the same length.
///
/// The order of the additions depends only on the length, so the result does not change from run to run.
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let (x_blocks, x_rest) = x.as_chunks::<LANES>();
    let (y_blocks, y_rest) = y.as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for (x, y) in x_blocks.iter().zip(y_blocks) {
        for lane in 0..LANES {
            sums[lane] = x[lane].mul_add(y[lane], sums[lane]);
        }
    }
    for ((x, y), sum) in x_rest.iter().zip(y_rest).zip(&mut sums) {
        *sum = x.mul_add(*y, *sum);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// Returns `e^x` within 2 units in the last place. `x` is clamped to the range in which the result is a normal number.
///
/// This is `expf` from Cephes (Moshier, 1992): `2^n * p(r)`, where `x = n ln 2 + r`. The constant `ln 2` is split into
/// two parts for accuracy.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves that integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.3);
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(-LN2_HIGH, x);
    let r = n.mul_add(-LN2_LOW, r);
    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    p = p.mul_add(r * r, r + 1.0);
    let exponent = (rounded.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    p * f32::from_bits(((exponent + 127) as u32) << 23)
}

/// Returns `tanh x`, computed with [`exp`], with an absolute error below 3e-7.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // Beyond 9.1, the result rounds to 1 or -1.
    let e = exp(2.0 * x.clamp(-9.1, 9.1));
    (e - 1.0) / (e + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_to_two_ulp() {
        let mut worst = 0f64;
        for step in -87_000..=88_000 {
            let x = step as f32 * 1e-3;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - exact) / exact).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn tanh_is_accurate_even_where_it_saturates() {
        let worst = (-12_000..=12_000)
            .map(|step| step as f32 * 1e-3)
            .map(|x| (f64::from(tanh(x)) - f64::from(x).tanh()).abs())
            .fold(0.0, f64::max);
        assert!(worst < 3e-7, "{worst}");
    }

    #[test]
    fn dot_includes_full_blocks_and_the_remainder() {
        for length in [0, 1, 31, 63, 64, 65, 127, 200] {
            let x: Vec<f32> = (0..length).map(|i| i as f32 * 0.5).collect();
            let expected: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((f64::from(dot(&x, &x)) - expected).abs() <= expected * 1e-6, "{length}");
        }
    }
}
