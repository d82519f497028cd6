//! The gated activation of the MLP, `gelu(gate) * up`, and its gradients.
//!
//! GELU in its tanh approximation is `x s(u)`, where `s` is the logistic function and `u = 2 sqrt(2/pi) (x + c x^3)`.
//! Its derivative is therefore `s + x s (1 - s) u'`, where `u' = 2 sqrt(2/pi) (1 + 3 c x^2)`.

use rayon::prelude::*;

use super::super::geglu::{ELEMENTS_PER_TASK, gelu};
use super::super::simd::{dispatch, exp};

/// Writes `gelu(gate) * up` for each element.
pub(in crate::model) fn geglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let inputs = gate.par_chunks(ELEMENTS_PER_TASK).zip(up.par_chunks(ELEMENTS_PER_TASK));
    let chunks = out.par_chunks_mut(ELEMENTS_PER_TASK).zip(inputs);
    chunks.for_each(|(out, (gate, up))| {
        dispatch(
            #[inline(always)]
            || {
                for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                    *out = gelu(gate) * up;
                }
            },
        );
    });
}

/// Replaces `gate` and `up` by their gradients, given that of `gelu(gate) * up`.
pub(in crate::model) fn geglu_backward(gate: &mut [f32], up: &mut [f32], gradient: &[f32]) {
    let pairs = gate
        .par_chunks_mut(ELEMENTS_PER_TASK)
        .zip(up.par_chunks_mut(ELEMENTS_PER_TASK));
    let chunks = pairs.zip(gradient.par_chunks(ELEMENTS_PER_TASK));
    chunks.for_each(|((gate, up), gradient)| {
        dispatch(
            #[inline(always)]
            || {
                for ((gate, up), &gradient) in gate.iter_mut().zip(up).zip(gradient) {
                    let (value, slope) = gelu_and_slope(*gate);
                    *gate = gradient * *up * slope;
                    *up = gradient * value;
                }
            },
        );
    });
}

/// Returns GELU and its derivative.
#[inline(always)]
fn gelu_and_slope(x: f32) -> (f32, f32) {
    // 2 sqrt(2/pi), and c of the tanh approximation.
    const FACTOR: f32 = 1.595_769_2;
    const CUBIC: f32 = 0.044_715;
    let squared = CUBIC * x * x;
    let logistic = 1.0 / (1.0 + exp(-FACTOR * squared.mul_add(x, x)));
    let slope = FACTOR * squared.mul_add(3.0, 1.0);
    let value = x * logistic;
    (value, (value * (1.0 - logistic)).mul_add(slope, logistic))
}

#[cfg(test)]
mod tests {
    use candle_core::{Result, Tensor, Var};

    use super::super::super::tests::random;
    use super::super::relative_error;
    use super::*;

    #[test]
    fn the_gradients_equal_those_of_plain_operations() -> Result<()> {
        let gate = Var::from_tensor(&(random((33, 700), 1)? * 6.0)?)?;
        let up = Var::from_tensor(&random((33, 700), 2)?)?;
        let gradient = random((33, 700), 3)?;
        let y = (gate.as_tensor().gelu()? * up.as_tensor())?;
        let gradients = (&y * &gradient)?.sum_all()?.backward()?;
        let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        let (mut d_gate, mut d_up) = (values(gate.as_tensor())?, values(up.as_tensor())?);
        let mut out = vec![f32::NAN; d_gate.len()];
        geglu(&d_gate, &d_up, &mut out);
        assert!(relative_error(&out, &values(&y)?) < 1e-6);
        geglu_backward(&mut d_gate, &mut d_up, &values(&gradient)?);
        for (found, var) in [(d_gate, &gate), (d_up, &up)] {
            let expected = gradients.get(var.as_tensor()).unwrap();
            assert!(relative_error(&found, &values(expected)?) < 2e-6);
        }
        Ok(())
    }

    #[test]
    fn the_slope_approaches_its_limits() {
        assert_eq!(gelu_and_slope(0.0), (0.0, 0.5));
        assert_eq!(gelu_and_slope(50.0), (50.0, 1.0));
        let (value, slope) = gelu_and_slope(-50.0);
        assert!(value.abs() < 1e-30 && slope.abs() < 1e-30);
    }
}
