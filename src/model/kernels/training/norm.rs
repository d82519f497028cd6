//! RMSNorm and its gradient, over rows.
//!
//! With `r = 1 / sqrt(mean(x^2) + eps)` and `g = dy * w`, the gradient of `y = x r w` with respect to `x` is
//! `r (g - x r^2 mean(g x))`. The weights are frozen and get no gradient.

use rayon::prelude::*;

use super::super::norm::{ROWS_PER_TASK, norm_row};
use super::super::simd::{dispatch, dot};

/// Writes each row of `x` normalised with `weight`, whose length is that of a row.
pub(in crate::model) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let chunk = ROWS_PER_TASK * weight.len();
    out.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).for_each(|(out, x)| {
        dispatch(
            #[inline(always)]
            || {
                let rows = out.chunks_exact_mut(weight.len()).zip(x.chunks_exact(weight.len()));
                for (out, x) in rows {
                    norm_row(x, weight, eps, out);
                }
            },
        );
    });
}

/// Writes `residual + rms_norm(y, post)`, or `residual + y` without a norm. `width` is the length of a row.
pub(in crate::model) fn add_norm(
    residual: &[f32],
    y: &[f32],
    post: Option<&[f32]>,
    eps: f32,
    width: usize,
    out: &mut [f32],
) {
    let chunk = ROWS_PER_TASK * width;
    let inputs = residual.par_chunks(chunk).zip(y.par_chunks(chunk));
    out.par_chunks_mut(chunk).zip(inputs).for_each(|(out, (residual, y))| {
        dispatch(
            #[inline(always)]
            || {
                match post {
                    Some(post) => {
                        for (out, y) in out.chunks_exact_mut(width).zip(y.chunks_exact(width)) {
                            norm_row(y, post, eps, out);
                        }
                    }
                    None => out.copy_from_slice(y),
                }
                for (out, residual) in out.iter_mut().zip(residual) {
                    *out += residual;
                }
            },
        );
    });
}

/// Writes the gradient with respect to `x`, given that of the normalised rows, plus `residual` if there is one.
pub(in crate::model) fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    gradient: &[f32],
    residual: Option<&[f32]>,
    out: &mut [f32],
) {
    let width = weight.len();
    let rows = out.par_chunks_mut(width).zip(x.par_chunks(width));
    let rows = rows.zip(gradient.par_chunks(width)).enumerate();
    rows.with_min_len(ROWS_PER_TASK)
        .for_each(|(index, ((out, x), gradient))| {
            dispatch(
                #[inline(always)]
                || {
                    norm_row_backward(x, weight, eps, gradient, out);
                    if let Some(residual) = residual {
                        for (out, residual) in out.iter_mut().zip(&residual[index * width..]) {
                            *out += residual;
                        }
                    }
                },
            );
        });
}

/// Writes the gradient of one row.
#[inline(always)]
pub(super) fn norm_row_backward(x: &[f32], weight: &[f32], eps: f32, gradient: &[f32], out: &mut [f32]) {
    let square = 1.0 / (dot(x, x) / x.len() as f32 + eps);
    let inverse = square.sqrt();
    for ((out, gradient), weight) in out.iter_mut().zip(gradient).zip(weight) {
        *out = gradient * weight;
    }
    let along = square * dot(out, x) / x.len() as f32;
    for (out, x) in out.iter_mut().zip(x) {
        *out = inverse * (*out - x * along);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Result, Var};

    use super::super::super::tests::random;
    use super::super::relative_error;
    use super::*;

    #[test]
    fn the_gradient_equals_that_of_plain_operations() -> Result<()> {
        for (rows, width) in [(1, 64), (37, 640), (40, 33)] {
            let x = Var::from_tensor(&random((rows, width), 1)?)?;
            let (weight, gradient, residual) =
                (random(width, 2)?, random((rows, width), 3)?, random((rows, width), 4)?);
            let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
            let y = x.broadcast_div(&(mean + 1e-6)?.sqrt()?)?.broadcast_mul(&weight)?;
            let gradients = (y * &gradient)?.sum_all()?.backward()?;
            let expected = gradients.get(x.as_tensor()).unwrap();
            let values = |x: &candle_core::Tensor| x.flatten_all()?.to_vec1::<f32>();
            for residual in [None, Some(&residual)] {
                let expected = match residual {
                    Some(residual) => (expected + residual)?,
                    None => expected.clone(),
                };
                let residual = residual.map(values).transpose()?;
                let mut found = vec![f32::NAN; rows * width];
                let (x, weight) = (values(x.as_tensor())?, values(&weight)?);
                rms_norm_backward(&x, &weight, 1e-6, &values(&gradient)?, residual.as_deref(), &mut found);
                assert!(relative_error(&found, &values(&expected)?) < 2e-6);
            }
        }
        Ok(())
    }
}
