//! RMSNorm of each head, if the architecture has it, and rotary position embedding, with their gradients.
//!
//! A rotation is orthogonal, so its gradient is rotated back by the same angle. It then passes through the norm as in
//! [`super::norm`].

use rayon::prelude::*;

use super::super::norm_rope::{TOKENS_PER_TASK, rotate_head};
use super::super::simd::dispatch;
use super::norm::norm_row_backward;

/// The norm of each head: its weight, as long as a head, and its epsilon.
pub(in crate::model) type HeadNorm<'a> = Option<(&'a [f32], f32)>;

/// Normalises and rotates each head of each token. `angles` holds the cosines and the sines, (tokens, head_dim / 2)
/// each; `half` is head_dim / 2.
pub(in crate::model) fn norm_rope(
    x: &[f32],
    (cos, sin): (&[f32], &[f32]),
    half: usize,
    norm: HeadNorm<'_>,
    out: &mut [f32],
) {
    let width = x.len() / (cos.len() / half);
    let tokens = out.par_chunks_mut(width).zip(x.par_chunks(width)).enumerate();
    tokens.with_min_len(TOKENS_PER_TASK).for_each(|(token, (out, x))| {
        let (cos, sin) = (&cos[token * half..][..half], &sin[token * half..][..half]);
        dispatch(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                    rotate_head(x, cos, sin, norm, out);
                }
            },
        );
    });
}

/// Writes the gradient with respect to the input `x` of [`norm_rope`], given that of its output. `gradient` is
/// overwritten.
pub(in crate::model) fn norm_rope_backward(
    x: &[f32],
    (cos, sin): (&[f32], &[f32]),
    half: usize,
    norm: HeadNorm<'_>,
    gradient: &mut [f32],
    out: &mut [f32],
) {
    let width = x.len() / (cos.len() / half);
    let tokens = out.par_chunks_mut(width).zip(x.par_chunks(width));
    let tokens = tokens.zip(gradient.par_chunks_mut(width)).enumerate();
    tokens
        .with_min_len(TOKENS_PER_TASK)
        .for_each(|(token, ((out, x), gradient))| {
            let (cos, sin) = (&cos[token * half..][..half], &sin[token * half..][..half]);
            dispatch(
                #[inline(always)]
                || {
                    let heads = out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half));
                    for ((out, x), gradient) in heads.zip(gradient.chunks_exact_mut(2 * half)) {
                        rotate_back(gradient, cos, sin);
                        match norm {
                            Some((weight, eps)) => norm_row_backward(x, weight, eps, gradient, out),
                            None => out.copy_from_slice(gradient),
                        }
                    }
                },
            );
        });
}

#[inline(always)]
fn rotate_back(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((first, second), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let (x, y) = (*first, *second);
        *first = x * cos + y * sin;
        *second = y * cos - x * sin;
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Result, Tensor, Var};

    use super::super::super::tests::random;
    use super::super::relative_error;
    use super::*;

    #[test]
    fn the_gradient_equals_that_of_plain_operations() -> Result<()> {
        let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        for (tokens, heads, half) in [(1, 1, 16), (19, 4, 32), (9, 3, 5)] {
            let x = Var::from_tensor(&random((tokens, heads, 2 * half), 1)?)?;
            let (cos, sin) = (random((tokens, 1, half), 2)?, random((tokens, 1, half), 3)?);
            let (weight, gradient) = (random(2 * half, 4)?, random((tokens, heads, 2 * half), 5)?);
            for with_norm in [false, true] {
                let normed = if with_norm {
                    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
                    x.broadcast_div(&(mean + 1e-6)?.sqrt()?)?.broadcast_mul(&weight)?
                } else {
                    x.as_tensor().clone()
                };
                let (first, second) = (normed.narrow(2, 0, half)?, normed.narrow(2, half, half)?);
                let rotated = [
                    (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?,
                    (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?,
                ];
                let y = Tensor::cat(&rotated, 2)?;
                let gradients = (&y * &gradient)?.sum_all()?.backward()?;
                let (input, weight, cos, sin) =
                    (values(x.as_tensor())?, values(&weight)?, values(&cos)?, values(&sin)?);
                let norm = with_norm.then_some((&weight[..], 1e-6));
                let angles = (&cos[..], &sin[..]);
                let mut found = vec![f32::NAN; input.len()];
                norm_rope(&input, angles, half, norm, &mut found);
                assert!(relative_error(&found, &values(&y)?) < 1e-6);
                norm_rope_backward(&input, angles, half, norm, &mut values(&gradient)?, &mut found);
                let expected = gradients.get(x.as_tensor()).unwrap();
                assert!(relative_error(&found, &values(expected)?) < 2e-6);
            }
        }
        Ok(())
    }
}
